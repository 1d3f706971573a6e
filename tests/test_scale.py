"""Batches larger than memory, several processes, and runs that are killed: the numbers stay those of the plain run."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fit, parts, run

import data
import finetune
from scl import ce_scl_loss

ROOT = Path(finetune.__file__).parent


def without_times(record, *others):
    return {name: value for name, value in record.items() if name not in ("seconds", "commit", *others)}


# ------------------------------------------------------------ --micro-batch-size


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_cached_gradients_are_those_of_all_pieces_at_once(pooling, size):
    """With dropout on, in float64: the same pieces, with their graphs, in one go."""
    model, train, _, config = parts(pooling)
    training = finetune.Training(model.double().train(), config)
    batch = train.take(np.arange(16))
    pieces, labels = [batch.texts[i : i + size] for i in range(0, 16, size)], torch.from_numpy(batch.labels)

    outputs = [training.forward(texts, number) for number, texts in enumerate(pieces)]
    class_logits, features = (torch.cat(part) for part in zip(*outputs, strict=True))
    expected = ce_scl_loss(class_logits.float(), features.float(), labels)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    model.zero_grad(set_to_none=True)
    losses = training.cached_backward(batch, size)
    torch.testing.assert_close(losses["loss"], expected)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-6, atol=1e-12)
    assert not gradients


@pytest.mark.parametrize("lam", [0, 0.9, 1])
def test_micro_batches_train_as_the_whole_batch_does(lam, monkeypatch):
    sizes, forward = [], finetune.Training.forward

    def seen(self, texts, piece=0):
        sizes.append(len(texts))
        return forward(self, texts, piece)

    monkeypatch.setattr(finetune.Training, "forward", seen)
    whole = fit(*parts(lam=lam, steps=20, eval_every=20, dropout=0.0))
    assert sizes == [16] * 20
    pieces = fit(*parts(lam=lam, steps=20, eval_every=20, dropout=0.0, micro_batch_size=5))
    assert sizes[20:] == [5, 5, 5, 1] * 2 * 20  # without a graph and with
    for name in ("ce", "scl") if lam else ("ce",):
        assert pieces[name] == pytest.approx(whole[name], rel=1e-3)


# ------------------------------------------------------------ several processes


def demo(out, *flags, ranks=1, **options):
    """finetune.py on the demo, in processes of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, str(ROOT / "finetune.py"), "--task", "demo", "--out", str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def finish(process, code=0):
    output, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    return output, error


def records(out):
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [[], ["--micro-batch-size", "3"]])
def test_two_ranks_give_the_losses_of_one_process(tmp_path, flags):
    common = ["--shots", "40", "--max-steps", "30", "--dropout", "0", "--lam", "0", "0.9", "--save", *flags]
    output, _ = finish(demo(tmp_path / "two", *common, ranks=2))
    finish(demo(tmp_path / "one", *common))
    assert output.count("step 30/30") == 2  # runs, each told by one process
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert (one.pop("processes"), two.pop("processes")) == (1, 2) and one.keys() == two.keys()
        for name in ("ce", "scl", "scl_lowest", "scl_collapsed"):
            assert two.get(name) == pytest.approx(one.get(name), abs=1e-5)
        assert two["validation_accuracy"] == one["validation_accuracy"]
        assert (tmp_path / "two" / two["run"] / "model.safetensors").is_file()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_micro_batches_go_through_both_stages_of_lam_1(tmp_path, pooling):
    flags = ("--shots", 20, "--lam", 1, "--dropout", 0, "--pooling", pooling)
    (whole,) = run(tmp_path / "whole", *flags)
    (pieces,) = run(tmp_path / "pieces", *flags, "--micro-batch-size", 5)
    assert (pieces["ce"], pieces["scl"]) == pytest.approx((whole["ce"], whole["scl"]), rel=1e-3)


def test_a_batch_that_cannot_be_shared_out(tmp_path):
    _, error = finish(demo(tmp_path, "--shots", "40", "--batch-size", "15", ranks=2), code=1)  # torchrun's own code
    assert "argument --batch-size: expected a multiple of 2, one share a process, got 15" in error


# ------------------------------------------------------------ kills


STEADY = ("--shots", "20", "--max-steps", "60", "--save-every", "7")


def weights(out):
    (record,) = records(out)
    return without_times(record), Path(out, record["run"], "model.safetensors").read_bytes()


@pytest.mark.parametrize("lam", ["0.9", "1"])
def test_killed_at_random_moments_the_run_is_bit_identical(tmp_path, lam):
    """KILLS=20 for more of them. Each process gets a little further than the one before, or at least as far."""
    finish(demo(tmp_path / "plain", *STEADY[:-2], "--lam", lam))
    moments = random.Random(0)
    kills = 0
    while kills < int(os.environ.get("KILLS", 2)):
        process = demo(tmp_path / "killed", *STEADY, "--lam", lam)
        for line in process.stdout:
            if line.startswith("step") and moments.random() < 0.4:
                break
        else:  # it came to its end
            process.communicate()
            Path(tmp_path / "killed" / "results.jsonl").unlink()
            continue
        time.sleep(0.02 * moments.random())
        process.kill()
        process.communicate()
        kills += 1
    finish(demo(tmp_path / "killed", *STEADY, "--lam", lam))
    assert weights(tmp_path / "killed") == weights(tmp_path / "plain")
    assert not list((tmp_path / "killed").glob("*.state.pt"))


def test_sigterm_finishes_the_step_saves_and_goes_on(tmp_path):
    long = ("--shots", "20", "--max-steps", "300")
    process = demo(tmp_path, *long)
    assert any(line.startswith("step 30/") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, error = finish(process, code=143)
    assert error.startswith("terminated after step ") and error.count("\n") == 1
    (state,) = tmp_path.glob("*.state.pt")
    output, _ = finish(demo(tmp_path, *long))
    assert f"going on from step {error.split()[3].rstrip(',')}, which {state} has" in output
    assert len(records(tmp_path)) == 1 and not state.exists()


def test_a_damaged_state_is_said_and_kept(tmp_path, capsys):
    process = demo(tmp_path, *STEADY)
    assert any(line.startswith("step 30/") for line in process.stdout)
    process.kill()
    process.communicate()
    (state,) = tmp_path.glob("*.state.pt")
    whole = state.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1  # one bit
    torch.save({"of": "another program"}, tmp_path / "other")
    for damaged in (whole[:1000], bytes(changed), (tmp_path / "other").read_bytes()):
        state.write_bytes(damaged)
        assert finetune.main(["--task", "demo", "--out", str(tmp_path), *STEADY]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{state} cannot be used" in error and "delete it" in error
        assert state.read_bytes() == damaged


def test_two_processes_with_one_folder_neither_lose_nor_double_a_record(tmp_path):
    flags = ("--shots", "20", "--max-steps", "20", "--lam", "0", "0.9", "--seed", "0", "1")
    processes = [demo(tmp_path, *flags) for _ in range(2)]
    for process in processes:
        finish(process)
    assert len(records(tmp_path)) == len({record["run"] for record in records(tmp_path)}) == 4


# ------------------------------------------------------------ faults


def test_a_state_that_the_disk_does_not_take(tmp_path):
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))}
    _, error = finish(demo(tmp_path, *STEADY, **limit), code=2)
    assert error.count("\n") == 1 and "cannot be written" in error and "the same command goes on" in error
    assert not list(tmp_path.iterdir())


def test_a_torn_record_of_the_same_run_is_no_record(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"run": "A", "lam": 0.')
    for _ in range(2):
        finetune.append_record(file, {"run": "A", "lam": 0.9})
    assert data.read_records(file) == [{"run": "A", "lam": 0.9}]


def test_out_of_memory_names_the_flag(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetune, "scl_loss", full)
    assert finetune.main(["--task", "demo", "--shots", "20", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error and "--micro-batch-size" in error


def test_an_output_folder_that_goes_away(tmp_path, monkeypatch):
    """It is made again: what a run has found is not lost for that."""
    predict = finetune.predict

    def remove(*rest):
        for file in sorted((tmp_path / "out").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        return predict(*rest)

    run(tmp_path / "out", "--shots", 20)
    monkeypatch.setattr(finetune, "predict", remove)
    assert len(run(tmp_path / "out", "--shots", 20, "--seed", 1)) == 1


def test_ten_thousand_classes_of_two_examples_and_a_line_of_5_mb(own, tmp_path, capsys):
    rows = [(f"word{i} is of its own class", f"class {i % 10_000}") for i in range(20_000)]
    rows[0] = ("long " * 1_000_000, "class 0")
    folder = own(train=rows, test=[(f"yet another word{i}", f"class {i}") for i in range(40)])
    flags = ["--task", str(folder), "--model", "demo", "--max-steps", "2", "--out", str(tmp_path / "out")]
    assert finetune.main(flags) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 500


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_agrees():
    torch._dynamo.reset()
    plain, compiled = (fit(*parts(steps=3, dropout=0.0, compile=compile)) for compile in (False, True))
    assert compiled["scl"] == pytest.approx(plain["scl"], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]

    model, train, _, config = parts(dropout=0.3, compile=True)
    training = finetune.Training(model, config)
    with torch.no_grad():  # gradient caching needs the same masks with a graph and without
        first = training.forward(train.texts)
    for output, again in zip(first, training.forward(train.texts), strict=True):
        assert torch.equal(output, again)
