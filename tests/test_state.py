"""parts/state.py: the optimiser, and runs that are killed and resumed."""

import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch

import finetune
from conftest import changed, finish, fit, parts, run, script, snapshot, without_times
from parts.data import demo_data
from parts.records import read_records
from parts.state import make_optimizer

# ------------------------------------------------------------ the optimiser


def test_the_classifier_has_its_own_learning_rate():
    model, *rest = parts(lam=0.5, lr=0.0, head_lr=1e-3)
    before = snapshot(model)
    fit(model, *rest)
    assert changed(model, before) == {name for name in model.classifier_names() if name in before}


def test_only_matrices_have_weight_decay():
    model, *_, config = parts(weight_decay=0.1)
    for group in make_optimizer(model, config, classifier_only=False).param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.1}


def test_the_last_step_has_the_full_learning_rate_even_if_all_steps_are_warm_up():
    model, *rest, config = parts(steps=1, eval_every=1, warmup_ratio=1.0)
    before = snapshot(model)
    fit(model, *rest, config)
    assert changed(model, before)


# ------------------------------------------------------------ a killed run


STEADY = ("--shots", "20", "--max-steps", "60", "--save-every", "7")


def weights(out):
    (record,) = read_records(out / "results.jsonl")
    return without_times(record), Path(out, record["run"], "model.safetensors").read_bytes()


@pytest.mark.parametrize("lam", ["0.9", "1"])
def test_a_run_that_is_killed_at_random_moments_is_bit_identical(tmp_path, lam):
    """KILLS=20 kills it more often. A process gets at least as far as the one before."""
    run(tmp_path / "plain", *STEADY[:-2], "--lam", lam)
    moments = random.Random(0)
    kills = 0
    while kills < int(os.environ.get("KILLS", 2)):
        process = script(tmp_path / "killed", *STEADY, "--lam", lam)
        for line in process.stdout:
            if line.startswith("step") and moments.random() < 0.4:
                break
        else:  # the process has finished its run
            process.communicate()
            Path(tmp_path / "killed" / "results.jsonl").unlink()
            continue
        time.sleep(0.02 * moments.random())
        process.kill()
        process.communicate()
        kills += 1
    run(tmp_path / "killed", *STEADY, "--lam", lam)
    assert weights(tmp_path / "killed") == weights(tmp_path / "plain")
    assert not list((tmp_path / "killed").glob("*.state.pt"))


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """An output folder with the saved state of a run that was interrupted after step 30."""
    out = tmp_path_factory.mktemp("interrupted")
    validate, restore = finetune.validate, pytest.MonkeyPatch()

    def interrupt(training, validation):
        if training.step == 30:
            raise KeyboardInterrupt
        return validate(training, validation)

    restore.setattr(finetune, "validate", interrupt)
    assert finetune.main(["--task", "demo", "--out", str(out), *STEADY]) == 130
    restore.undo()
    return out


def test_the_same_command_resumes(interrupted, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    (state,) = out.glob("*.state.pt")
    (record,) = run(out, *STEADY)
    printed = capsys.readouterr().out
    assert f"resuming after step 28, from {state}" in printed and "step 30/60" in printed and "step 24/" not in printed
    assert [step for step, _ in record["validation_accuracies"]] == list(range(6, 61, 6))
    assert not state.exists()


def test_the_state_of_another_setting_is_reported(interrupted, tmp_path, capsys):
    """Such as after out of memory: the message advises --micro-batch-size, which is another setting."""
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    (state,) = out.glob("*.state.pt")
    run(out, *STEADY, "--micro-batch-size", 8)
    captured = capsys.readouterr()
    assert captured.err == f"note: {state} is the saved state of a run with other flags; this run starts at step 1\n"
    assert "step 6/60" in captured.out and state.exists()
    run(out, *STEADY, "--seed", 1)
    assert "note" not in capsys.readouterr().err  # the state of another seed is expected


def test_the_state_of_a_run_with_other_class_names_is_refused(interrupted, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    data = demo_data()._replace(label_names=("bad", "good"))
    monkeypatch.setattr(finetune, "load_data", lambda *_, **__: data)
    assert finetune.main(["--task", "demo", "--out", str(out), *STEADY]) == 2
    assert "state.pt cannot be used (its run had other class names); " in capsys.readouterr().err
    assert len(list(out.glob("*.state.pt"))) == 1


def test_a_damaged_state_is_reported_and_kept(interrupted, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    (state,) = out.glob("*.state.pt")
    complete = state.read_bytes()
    one_bit = bytearray(complete)
    one_bit[len(complete) // 2] ^= 1
    torch.save({"of": "another program"}, tmp_path / "other")
    for damaged in (complete[:1000], bytes(one_bit), (tmp_path / "other").read_bytes()):
        state.write_bytes(damaged)
        assert finetune.main(["--task", "demo", "--out", str(out), *STEADY]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{state} cannot be used" in error and "delete the file" in error
        assert state.read_bytes() == damaged


def test_a_state_for_which_the_disk_is_too_small(tmp_path):
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))}
    _, error = finish(script(tmp_path, *STEADY, **limit), code=2)
    assert error.count("\n") == 1 and "cannot be written" in error and "repeat the command" in error
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]
    assert not read_records(tmp_path / "results.jsonl")
