"""finetune.py: the training loop, its loss, one run, a sweep, and what the command prints."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import finetune
from conftest import changed, fit, parts, run, sentences, snapshot, user_error, without_times
from parts import data
from parts.pretrained import load_tokenizer
from parts.records import append_record, read_records
from parts.state import Training
from scl import ce_scl_loss

ROOT = Path(finetune.__file__).parent

# ------------------------------------------------------------ the training loop


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_scl_trains_the_encoder_and_not_the_classifier(pooling):
    """Two public re-implementations compute SCL on detached features. Then no weight would change here."""
    model, *rest = parts(pooling, lam=1, weight_decay=0.1)
    before = snapshot(model)
    fit(model, *rest)
    moved = changed(model, before)
    assert not moved & model.classifier_names()
    assert {name for name in moved if "layer.0" in name and name.endswith("query.weight")}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_scl_changes_the_gradient_of_the_encoder(pooling):
    gradients = {}
    for lam in (0.0, 0.9):
        model, train, _, config = parts(pooling, lam=lam)
        training = Training(model.eval(), config)
        batch = train.take(np.arange(16))
        finetune.objective(training, *finetune.forward(training, batch.texts), batch.labels)["loss"].backward()
        gradients[lam] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, ce_alone in gradients[0.0].items():
        scl_part = gradients[0.9][name] - 0.1 * ce_alone
        if name in model.classifier_names():
            assert scl_part.abs().max() <= 1e-6
        elif ".layer." in name and scl_part.ndim == 2:
            assert scl_part.norm() > 1e-4 * ce_alone.norm(), name  # float32 rounds at 1e-7


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_the_objective_is_that_of_scl_py(lam):
    model, train, _, config = parts(lam=lam, tau=0.7)
    training = Training(model.eval(), config)
    batch = train.take(np.arange(16))
    class_logits, features = finetune.forward(training, batch.texts)
    losses = finetune.objective(training, class_logits, features, batch.labels)
    expected = ce_scl_loss(class_logits, features, torch.from_numpy(batch.labels), lam=lam, temperature=0.7)
    torch.testing.assert_close(losses["loss"], expected)


def test_ce_and_ce_plus_scl_share_the_first_weights_the_batches_and_the_dropout():
    """With learning rate 0, their cross-entropy is therefore the same."""
    values = [fit(*parts(lam=lam, lr=0.0, head_lr=0.0))["ce"] for lam in (0.0, 0.5)]
    assert values[0] == values[1]


@pytest.mark.parametrize("source", ["batches", "dropout"])
def test_batches_and_dropout_depend_on_the_seed(source):
    """With learning rate 0 and the same weights, CE differs only by the examples of a batch or by the dropout."""
    settings = {"batches": {"dropout": 0.0, "batch_size": 4}, "dropout": {"batch_size": 20}}[source]
    values = [fit(*parts(lam=0.0, lr=0.0, head_lr=0.0, steps=1, eval_every=1, seed=seed, **settings))["ce"]
              for seed in (0, 1, 0)]
    assert values[0] == values[2] != pytest.approx(values[1], rel=1e-4)


def test_the_best_validation_is_kept_and_the_later_if_two_are_equal(monkeypatch):
    accuracies = iter([0.5, 0.7, 0.7, 0.6])
    monkeypatch.setattr(finetune, "classification_metrics", lambda *_: {"accuracy": next(accuracies)})
    model, train, validation, config = parts(steps=4, eval_every=1)
    seen = []
    predict = finetune.predict
    monkeypatch.setattr(finetune, "predict", lambda model, *rest: seen.append(snapshot(model)) or predict(model, *rest))
    result = fit(model, train, validation, config)
    assert (result["best_step"], result["validation_accuracy"]) == (3, 0.7)
    assert not changed(model, seen[2]) and changed(model, seen[3])


def test_the_losses_are_means_over_the_steps_since_the_last_validation(monkeypatch):
    seen = []
    scl_loss = finetune.scl_loss
    monkeypatch.setattr(finetune, "scl_loss", lambda *rest: seen.append(scl_loss(*rest)) or seen[-1])
    result = fit(*parts(steps=60, eval_every=25))
    assert len(seen) == 60
    assert result["scl"] == pytest.approx(sum(loss.item() for loss in seen[50:]) / 10, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_agrees_within_its_rounding(precision):
    full = fit(*parts(lam=0.9, lr=1e-5, head_lr=1e-5))
    low = fit(*parts(lam=0.9, lr=1e-5, head_lr=1e-5, precision=precision))
    assert low["scl"] != full["scl"]
    assert low["scl"] == pytest.approx(full["scl"], rel=0.02) and low["ce"] == pytest.approx(full["ce"], rel=0.02)


def test_lam_1_trains_the_classifier_in_a_second_stage_on_frozen_features(tmp_path, capsys):
    model, train, validation, config = parts(lam=1, steps=200, eval_every=200)
    fit(model, train, validation, config)
    before = snapshot(model)
    result = fit(model, train, validation, config, classifier_only=True)
    assert changed(model, before) <= model.classifier_names()
    assert result["validation_accuracy"] > 0.7
    (record,) = run(tmp_path, "--shots", 20, "--lam", 1)
    assert record["head_lr"] == 1e-3 and record["scl"] > 0 and record["validation_accuracy"] > 0
    assert "a second stage trains the classifier on frozen features" in capsys.readouterr().out


@pytest.mark.parametrize("sampler, expected", [("shuffled", {0, 1, 2}), ("balanced", {2})])
def test_the_sampler_chooses_the_batches(monkeypatch, sampler, expected):
    """Counts the examples of a class in batches of 4. The class has 3 of the 20 examples."""
    counts, objective = [], finetune.objective
    monkeypatch.setattr(finetune, "objective", lambda training, class_logits, features, labels: (
        counts.append(int(labels.sum())) or objective(training, class_logits, features, labels)))
    model, train, *rest = parts(steps=30, eval_every=30, batch_size=4, sampler=sampler)
    train.labels[:] = np.arange(20) < 3
    fit(model, train, *rest)
    assert set(counts) - {3} == expected


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_agrees():
    def one_layer(**settings):
        model, *rest = parts(**settings)
        model.backbone.roberta.encoder.layer = model.backbone.roberta.encoder.layer[:1]  # compiles in half the time
        return model, *rest

    torch._dynamo.reset()
    plain, compiled = (fit(*one_layer(steps=3, dropout=0.0, compile=compile)) for compile in (False, True))
    assert compiled["scl"] == pytest.approx(plain["scl"], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]

    model, train, _, config = one_layer(dropout=0.3, compile=True)
    training = Training(model, config)
    with torch.no_grad():  # gradient caching needs the same dropout mask with a graph and without
        first = finetune.forward(training, train.texts)
    for output, again in zip(first, finetune.forward(training, train.texts), strict=True):
        assert torch.equal(output, again)


# ------------------------------------------------------------ batches


def draw(labels, size, sampler, n):
    stream = finetune.batches(np.array(labels), size, sampler, 0)
    return [next(stream) for _ in range(n)]


def test_an_epoch_has_every_example_once_except_those_of_a_short_last_batch():
    first, second, third = draw([0] * 23, 10, "shuffled", 3)
    assert len({*first, *second}) == 20
    assert set(third) != set(first)


def test_the_only_batch_of_an_epoch_may_be_short():
    for indices in draw([0, 1, 1, 0], 16, "shuffled", 3):
        assert sorted(indices) == [0, 1, 2, 3]


def test_balanced_batches_have_two_examples_of_each_class():
    labels = [0] * 90 + [1] * 6 + [2] * 4
    for indices in draw(labels, 8, "balanced", 50):
        assert len(set(indices)) == 8
        assert np.bincount(np.array(labels)[indices], minlength=3).min() >= 2


def test_balanced_batches_that_are_too_small_for_all_classes_have_pairs_of_some():
    labels = np.repeat(np.arange(10), 5)
    for indices in draw(labels, 8, "balanced", 20):
        assert np.unique(labels[indices], return_counts=True)[1].tolist() == [2, 2, 2, 2]


def test_balanced_batches_never_repeat_the_only_example_of_a_class():
    for indices in draw([0, 0, 0, 1], 4, "balanced", 5):
        assert sorted(indices) == [0, 1, 2, 3]


# ------------------------------------------------------------ --micro-batch-size


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_cached_gradients_equal_those_of_one_graph(pooling, size):
    """With dropout, in float64: the same micro-batches, all with their graphs at once."""
    model, train, _, config = parts(pooling)
    training = Training(model.double().train(), config)
    batch = train.take(np.arange(16))
    micro_batches, labels = [batch.texts[i : i + size] for i in range(0, 16, size)], torch.from_numpy(batch.labels)

    outputs = [finetune.forward(training, texts, number) for number, texts in enumerate(micro_batches)]
    class_logits, features = (torch.cat(part) for part in zip(*outputs, strict=True))
    expected = ce_scl_loss(class_logits.float(), features.float(), labels)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    model.zero_grad(set_to_none=True)
    losses = finetune.cached_backward(training, batch, size)
    torch.testing.assert_close(losses["loss"], expected)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-6, atol=1e-12)
    assert not gradients


@pytest.mark.parametrize("lam", [0, 0.9, 1])
def test_micro_batches_train_like_the_whole_batch(lam, monkeypatch):
    sizes, forward = [], finetune.forward

    def counted(training, texts, micro_batch=0):
        sizes.append(len(texts))
        return forward(training, texts, micro_batch)

    monkeypatch.setattr(finetune, "forward", counted)
    whole = fit(*parts(lam=lam, steps=20, eval_every=20, dropout=0.0))
    assert sizes == [16] * 20
    pieces = fit(*parts(lam=lam, steps=20, eval_every=20, dropout=0.0, micro_batch_size=5))
    assert sizes[20:] == [5, 5, 5, 1] * 2 * 20  # without a graph and with
    for name in ("ce", "scl") if lam else ("ce",):
        assert pieces[name] == pytest.approx(whole[name], rel=1e-3)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_micro_batches_work_in_both_stages_of_lam_1(tmp_path, pooling):
    flags = ("--shots", 20, "--lam", 1, "--dropout", 0, "--pooling", pooling)
    (whole,) = run(tmp_path / "whole", *flags)
    (pieces,) = run(tmp_path / "pieces", *flags, "--micro-batch-size", 5)
    assert (pieces["ce"], pieces["scl"]) == pytest.approx((whole["ce"], whole["scl"]), rel=1e-3)


# ------------------------------------------------------------ one run and its record


def test_the_fields_of_a_record(tmp_path):
    (record,) = run(tmp_path, "--shots", 20, "--lam", 0.5, "--tau", 0.4)
    assert (record["lam"], record["tau"], record["seed"], record["shots"], record["steps"]) == (0.5, 0.4, 0, 20, 4)
    assert (record["train_size"], record["validation_size"], record["test_size"]) == (20, 200, 300)
    assert 0 < record["scl_lowest"] <= record["scl"] and record["scl_collapsed"] == pytest.approx(math.log(15))
    assert all(0 <= record[name] <= 1 for name in ("validation_accuracy", "test_accuracy", "test_macro_f1"))
    assert record["best_step"] in range(1, 5) and record["ce"] > 0 and -1 <= record["test_mcc"] <= 1
    assert {"torch", "transformers", "commit", "device", "seconds", "lr", "model", "train_checksum"} <= set(record)
    assert (record["arm"], record["base_model"], record["num_texts"]) == ("demo-n20-lam0.5-tau0.4", "demo", 1)
    assert re.fullmatch("[0-9a-f]{12}", record["label_checksum"])
    assert record["run"].startswith("demo-n20-lam0.5-tau0.4-seed0-")
    validations = record["validation_accuracies"]
    assert [step for step, _ in validations] == [1, 2, 3, 4]
    assert record["validation_accuracy"] == max(accuracy for _, accuracy in validations)
    correct = np.unpackbits(np.frombuffer(bytes.fromhex(record["test_correct"]), np.uint8), count=300)
    assert correct.mean() == pytest.approx(record["test_accuracy"])


def test_lam_0_has_neither_tau_nor_scl(tmp_path):
    (record,) = run(tmp_path, "--shots", 20, "--lam", 0)
    assert record["tau"] is None and not [name for name in record if name.startswith("scl")]
    assert record["arm"] == "demo-n20-lam0"


def test_batches_without_a_positive_pair_are_reported(tmp_path, capsys):
    (record,) = run(tmp_path, "--shots", 20, "--batch-size", 2)
    assert record["scl"] == 0
    assert "no batch of three or more examples had two examples of one class" in capsys.readouterr().out


def save_translator(folder, seed):
    """Saves a tiny sequence-to-sequence model with random weights."""
    tokenizer = load_tokenizer("demo", "cls")
    torch.manual_seed(seed)
    small = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    small |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 8)
    config = transformers.BartConfig(vocab_size=len(tokenizer), **small)
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_back_translation_adds_three_translations_of_each_example_and_keeps_them(tmp_path, monkeypatch):
    translators = [save_translator(tmp_path / name, seed) for seed, name in enumerate(("en-de", "de-en"))]
    out, flags = tmp_path / "out", ["--shots", 20, "--noise", "backtranslation", "--translators", *translators]
    (clean,) = run(tmp_path / "clean", "--shots", 20)
    ce, scl = run(out, *flags, "--noise-level", 0.7, "--lam", 0, 0.9)
    assert ce["train_checksum"] == scl["train_checksum"] != clean["train_checksum"]
    assert (ce["train_size"], ce["shots"], ce["test_checksum"]) == (80, 20, clean["test_checksum"])
    hotter = run(out, *flags, "--noise-level", 1.5)[-1]
    assert hotter["train_checksum"] != ce["train_checksum"]
    kept = sorted(file.name for file in out.glob("backtranslation-*.json"))
    again = run(tmp_path / "again", *flags, "--noise-level", 0.7)[0]
    assert again["train_checksum"] == ce["train_checksum"]  # the seed determines the translations
    monkeypatch.setattr(data, "translate", None)
    third = run(out, *flags, "--noise-level", 0.7, "--lam", 0.5)[-1]  # reads the translations from the file
    assert third["train_checksum"] == ce["train_checksum"] and len(kept) == 2

    split, _, _ = data.sample(data.demo_data(), 20, None, 0)
    noisy = data.back_translate(split, 0.7, list(map(str, translators)), out, 0, torch.device("cpu"))
    assert noisy.texts[:20] == split.texts and noisy.labels[:20].tolist() == split.labels.tolist()
    assert noisy.labels[20:].tolist() == np.repeat(split.labels, 3).tolist()
    assert len({text for (text,) in noisy.texts[20:23]} - {split.texts[0][0]}) == 3


@pytest.mark.parametrize("noise", ["label", "word"])
def test_noise_changes_only_the_training_set(tmp_path, noise):
    (clean,) = run(tmp_path, "--shots", 20)
    noisy = run(tmp_path, "--shots", 20, "--noise", noise, "--noise-level", 0.3)[-1]
    same = [noisy[f"{split}_checksum"] == clean[f"{split}_checksum"] for split in ("train", "validation", "test")]
    assert same == [False, True, True]


def test_a_new_checkpoint_replaces_the_old_folder(tmp_path):
    (record,) = run(tmp_path, "--shots", 20)
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / record["run"] / "stray").touch()
    run(tmp_path, "--shots", 20)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([record["run"], "results.jsonl"])
    assert not (tmp_path / record["run"] / "stray").exists()


def test_a_file_with_the_name_of_a_checkpoint_is_reported_in_one_line(capsys, tmp_path):
    (record,) = run(tmp_path / "first", "--shots", 20)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / record["run"]).write_text("mine")
    flags = ["--task", "demo", "--max-steps", "4", "--shots", "20", "--out", str(tmp_path / "second")]
    assert finetune.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{record['run']} cannot be written" in error
    assert (tmp_path / "second" / record["run"]).read_text() == "mine"
    assert not read_records(tmp_path / "second" / "results.jsonl")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_best_checkpoint(tmp_path, capsys):
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "60", "--eval-every", "1", "--warmup-ratio", "1"]
    assert finetune.main([*flags, "--lr", "1e38", "--save-every", "1", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite by step 2" in error and "is from step 1, the best step" in error
    assert "try a smaller --lr" in error and not read_records(tmp_path / "results.jsonl")
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "results.jsonl")  # and no saved state
    assert all(weight.isfinite().all() for weight in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("lam", ["0.9", "1"])
def test_a_run_whose_gradients_all_overflow_has_no_record(tmp_path, capsys, monkeypatch, lam):
    """With lam 1, only the gradients of the first stage overflow."""
    scaler, scales = torch.amp.GradScaler, iter((2.0**120, 1.0))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=next(scales)))
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "3", "--precision", "fp16", "--lam", lam]
    assert finetune.main([*flags, "--out", str(tmp_path)]) == 2
    assert "no step changed a weight" in capsys.readouterr().err and not read_records(tmp_path / "results.jsonl")


def test_out_of_memory_names_the_flag(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetune, "scl_loss", full)
    assert finetune.main(["--task", "demo", "--shots", "20", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error and "--micro-batch-size" in error


def test_compile_without_a_compiler_is_reported_in_one_line(tmp_path, capsys, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(*_, **__):
        raise InvalidCxxCompiler("no-compiler")

    monkeypatch.setattr(torch, "compile", fail)
    assert finetune.main(["--task", "demo", "--shots", "20", "--compile", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "argument --compile: Compiler: no-compiler is not found" in error


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_a_deleted_output_folder_is_made_again(tmp_path, monkeypatch, seeds):
    """With one seed a checkpoint is written, with two seeds only records."""
    predict = finetune.predict

    def delete(*rest):
        if (tmp_path / "out").is_dir() and not read_records(tmp_path / "out" / "results.jsonl"):
            shutil.rmtree(tmp_path / "out")
        return predict(*rest)

    monkeypatch.setattr(finetune, "predict", delete)
    assert [record["seed"] for record in run(tmp_path / "out", "--shots", 20, "--seed", *seeds)] == seeds


# ------------------------------------------------------------ a sweep


def test_a_run_gives_the_same_bits_alone_and_in_a_sweep(tmp_path):
    flags = ("--shots", 20, "--tau", 0.1, 0.3, "--save")
    sweep = run(tmp_path / "sweep", "--lam", 0, 0.9, "--seed", 1, 0, *flags)
    assert [(r["lam"], r["tau"], r["seed"]) for r in sweep] == [
        (0, None, 1), (0.9, 0.1, 1), (0.9, 0.3, 1), (0, None, 0), (0.9, 0.1, 0), (0.9, 0.3, 0)]
    for record in (sweep[2], sweep[3]):
        tau = record["tau"] or 0.7  # lam 0 ignores tau
        lam, seed, out = record["lam"], record["seed"], tmp_path / f"alone{tau}"
        (alone,) = run(out, "--shots", 20, "--lam", lam, "--tau", tau, "--seed", seed)
        assert without_times(alone) == without_times(record)
        weights = [folder / alone["run"] / "model.safetensors" for folder in (tmp_path / "sweep", out)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_runs_of_one_seed_are_paired_and_seeds_differ(tmp_path):
    records = run(tmp_path, "--shots", 20, "--lam", 0, 0.3, 0.9, "--seed", 0, 1)
    assert len({(r["seed"], r["train_checksum"]) for r in records}) == len({r["train_checksum"] for r in records}) == 2
    assert len({r["test_checksum"] for r in records}) == len({r["validation_checksum"] for r in records}) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]  # a sweep keeps checkpoints only with --save


def test_a_sweep_over_learning_rates(tmp_path, capsys):
    flags = ("--shots", 20, "--lam", 0, "--head-lr", 5e-3)
    first, second = run(tmp_path, *flags, "--lr", 1e-3, 2e-4, 1e-3)
    (alone,) = run(tmp_path / "alone", *flags, "--lr", 2e-4)
    assert (first["lr"], second["lr"], first["head_lr"], second["head_lr"]) == (1e-3, 2e-4, 5e-3, 5e-3)
    assert first["run"] != second["run"] and first["arm"] == second["arm"] and first["ce"] != second["ce"]
    assert first["train_checksum"] == second["train_checksum"]
    assert without_times(alone) == without_times(second)
    printed = capsys.readouterr().out
    assert "lr 0.001, 4 steps" in printed and "lr 0.0002, 4 steps" in printed
    assert "run 2 of 2" in printed  # a repeated value is one run


def test_without_head_lr_the_classifier_has_each_learning_rate(tmp_path):
    records = run(tmp_path, "--shots", 20, "--lr", 1e-3, 2e-4, "--max-steps", 1)
    assert [(record["lr"], record["head_lr"]) for record in records] == [(1e-3, 1e-3), (2e-4, 2e-4)]


def test_a_sweep_prints_its_progress_and_the_command_for_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune.time, "perf_counter", iter(range(0, 10**9, 3600)).__next__)  # each run takes 1 h
    run(tmp_path, "--shots", 20, "--lam", 0, 0.9, "--seed", 4, 5)
    lines = capsys.readouterr().out.splitlines()
    assert "loading demo" in lines
    starts = [line for line in lines if line.startswith("run ")]
    assert [line.split(":")[0] for line in starts] == [f"run {i} of 4" for i in (1, 2, 3, 4)]
    assert [line.split(", ")[1:] for line in starts] == [
        [], ["about 3.0 h left"], ["about 2.0 h left"], ["about 60 min left"]]
    assert lines.count("no checkpoint; --save keeps checkpoints in a sweep") == 4
    results = tmp_path / "results.jsonl"
    assert lines[-1] == f"the records are in {results}; this command prints a table: python eval.py table {tmp_path}"


def test_a_finished_run_prints_its_result_and_is_not_repeated(tmp_path, capsys):
    run(tmp_path, "--shots", 20, "--seed", 0)
    first = capsys.readouterr().out
    (result,) = [line for line in first.splitlines() if line.startswith("test accuracy")]
    assert f"checkpoint in {tmp_path}/demo-n20-" in first
    run(tmp_path, "--shots", 20, "--seed", 0)
    again = capsys.readouterr().out
    assert result in again and "{" not in again and "step 4/4" not in again
    assert "this run is finished; to repeat the run, delete its line in" in again
    (folder,) = tmp_path.glob("demo-n20-*")
    shutil.rmtree(folder)
    run(tmp_path, "--shots", 20, "--seed", 0)
    assert "this run is finished and has no checkpoint; to repeat the run" in capsys.readouterr().out
    assert len(run(tmp_path, "--shots", 20, "--seed", 0, 1)) == 2


def test_a_repeated_run_says_that_the_old_checkpoint_is_not_its_own(tmp_path, capsys):
    (record,) = run(tmp_path, "--shots", 20)
    (tmp_path / "results.jsonl").unlink()
    run(tmp_path, "--shots", 20, "--seed", 0, 1)
    told = capsys.readouterr().out
    old = f"no checkpoint; {tmp_path / record['run']} has the checkpoint of an earlier run with this name"
    assert told.count(old) == 1 and told.count("no checkpoint; --save keeps checkpoints in a sweep") == 1


def test_a_record_with_other_class_names_is_refused(tmp_path, own, capsys):
    """The names decide whether a checkpoint keeps its classifier, and `predict` prints them."""
    def task(*names):
        rows = [(text, names[i % 2]) for i, text in enumerate(sentences(90))]
        return own(train=rows[:30], validation=rows[30:60], test=rows[60:])

    (record,) = run(tmp_path, "--task", task("no", "yes"), "--model", "demo")
    flags = ["--task", str(task("bad", "good")), "--model", "demo", "--max-steps", "4", "--out", str(tmp_path)]
    assert finetune.main(flags) == 2
    told = capsys.readouterr().err
    assert "results.jsonl has a record of this name with other class names; choose another folder" in told
    assert read_records(tmp_path / "results.jsonl") == [record]


@pytest.mark.parametrize("field, value", [("lr", 5.93e-5), ("num_texts", 2)])
def test_a_record_of_another_run_with_the_same_name_is_refused(tmp_path, capsys, field, value):
    """The digest in a name has 24 bits, so two runs may have the same name. `num_texts` is not part of the digest."""
    (record,) = run(tmp_path, "--shots", 20)
    (tmp_path / "results.jsonl").write_text(json.dumps(record | {field: value}) + "\n")
    assert finetune.main(["--task", "demo", "--max-steps", "4", "--shots", "20", "--out", str(tmp_path)]) == 2
    assert f"results.jsonl has a record of this name with other {field}; choose another" in capsys.readouterr().err
    del record["num_texts"]  # an old record
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    run(tmp_path, "--shots", 20)
    assert "this run is finished" in capsys.readouterr().out


def test_a_damaged_record_of_the_run_gives_one_line(capsys, tmp_path):
    (record,) = run(tmp_path, "--shots", 20)
    (tmp_path / "results.jsonl").write_text(json.dumps({"run": record["run"]}) + "\n")
    capsys.readouterr()
    assert finetune.main(["--task", "demo", "--max-steps", "4", "--shots", "20", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"finetune.py: error: argument --out: {tmp_path}/results.jsonl cannot be used")
    assert "delete the line of this run" in error and error.count("\n") == 1


def test_a_run_that_another_process_has_finished_meanwhile_is_not_repeated(tmp_path, monkeypatch):
    finished = run(tmp_path / "other", "--shots", 20, "--seed", 1)
    print_setting = finetune.records.print_setting

    def meanwhile(config, *rest):
        assert config["seed"] == 0
        (tmp_path / "out").mkdir()
        append_record(tmp_path / "out" / "results.jsonl", finished[0])
        print_setting(config, *rest)

    monkeypatch.setattr(finetune.records, "print_setting", meanwhile)
    assert [record["seed"] for record in run(tmp_path / "out", "--shots", 20, "--seed", 0, 1)] == [1, 0]


def test_a_run_that_diverges_does_not_stop_the_sweep(tmp_path, capsys, monkeypatch):
    objective = finetune.objective
    monkeypatch.setattr(finetune, "objective", lambda training, *rest: {
        name: value * (math.nan if training.config["seed"] == 1 else 1)
        for name, value in objective(training, *rest).items()})
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "4", "--seed", "0", "1", "2", "--out", str(tmp_path)]
    assert finetune.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed1" in error and "the loss is not finite" in error
    assert [record["seed"] for record in read_records(tmp_path / "results.jsonl")] == [0, 2]


def test_one_folder_is_one_task_however_its_path_is_written(tmp_path, own, monkeypatch):
    own(train=[(text, i % 2) for i, text in enumerate(sentences(30))], test=[("what else", 0), ("not so", 1)])
    monkeypatch.chdir(tmp_path)
    for task in ("own", "own/", "./own", "out/../own"):
        flags = ["--shots", "8", "--max-steps", "2", "--model", "demo", "--out", "out"]
        assert finetune.main(["--task", task, *flags]) == 0
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    assert record["task"] == "own"


def test_a_folder_named_like_a_built_in_task_is_another_task(tmp_path, own, monkeypatch):
    own(train=[(text, "abc"[i % 3]) for i, text in enumerate(sentences(60))], test=[("so", "a"), ("not", "b")])
    (tmp_path / "own").rename(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    flags = ["--shots", "9", "--max-steps", "2", "--model", "demo", "--out", "out", "--task"]
    for task in ("./demo", "demo"):
        assert finetune.main([*flags, task]) == 0
    folder, built_in = read_records(tmp_path / "out" / "results.jsonl")
    assert (folder["task"], folder["test_size"]) == ("./demo", 2) and built_in["test_size"] == 300
    (tmp_path / "out" / built_in["run"]).rename(tmp_path / "out" / "demo")
    monkeypatch.chdir(tmp_path / "out")
    assert finetune.parse_args(["--task", "sst2", "--model", "./demo"]).model == "./demo"


def test_a_task_with_a_very_long_name(tmp_path, own):
    folder = own(train=[(text, i % 2) for i, text in enumerate(sentences(40))], test=[("so", 0), ("not so", 1)])
    long = folder.rename(tmp_path / ("t" * 250))
    flags = ["--model", "demo", "--shots", "8", "--max-steps", "2", "--save-every", "1", "--out", str(tmp_path / "out")]
    assert finetune.main(["--task", str(long), *flags]) == 0
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    assert (tmp_path / "out" / record["run"] / "model.safetensors").exists()


def test_ten_thousand_classes_of_two_examples_and_a_text_of_5_mb(own, tmp_path, capsys):
    rows = [(f"word{i} has a class for itself", f"class {i % 10_000}") for i in range(20_000)]
    rows[0] = ("long " * 1_000_000, "class 0")
    folder = own(train=rows, test=[(f"yet another word{i}", f"class {i}") for i in range(40)])
    flags = ["--task", str(folder), "--model", "demo", "--max-steps", "2", "--out", str(tmp_path / "out")]
    assert finetune.main(flags) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 500


# ------------------------------------------------------------ what the command prints before training


LONG = [(f"{'the plot was great ' * 30}{i}", i % 2) for i in range(30)]


def test_truncated_texts_are_reported(own, tmp_path, capsys):
    task = own(train=LONG[:20], test=LONG[20:])
    flags = ["--task", str(task), "--model", "demo", "--max-steps", "2", "--shots", "8", "--out", str(tmp_path / "out")]
    for limit in (32, 64):
        assert finetune.main([*flags, "--max-length", str(limit)]) == 0
        assert f"warning: 8 of 8 texts have more than {limit} tokens" in capsys.readouterr().out
    run(tmp_path / "demo", "--shots", 20)
    assert "tokens" not in capsys.readouterr().out


def test_dry_run_prints_the_setting_and_writes_nothing(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "fit", None)
    task = own(train=LONG[:20], test=LONG[20:])
    flags = ["--task", str(task), "--model", "demo", "--shots", "8", "--seed", "3", "4", "--lam", "0", "0.9"]
    assert finetune.main([*flags, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    output, error = capsys.readouterr()
    assert error == "" and not (tmp_path / "out").exists()
    for line in ("run 1 of 4: own-n8-lam0-seed3-", "200 steps of 8 examples", "  train: 8 examples (0: 4, 1: 4)",
                 "  test: 10 examples (0: 5, 1: 5)", "  0: the plot was great the plot was great",
                 "warning: 8 of 8 texts have more than 64 tokens"):
        assert line in output
    assert "run 2 of 4" not in output


def test_dry_run_finds_the_errors_of_a_run(tmp_path, capsys):
    error = user_error(capsys, tmp_path, "--task", "demo", "--dry-run", "--model", tmp_path)
    assert "has no config.json" in error


def test_a_dry_run_and_a_run_have_the_same_name(tmp_path, capsys):
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "1", "--out", str(tmp_path)]
    for dry_run in (["--dry-run"], []):
        assert finetune.main([*flags, *dry_run]) == 0
    names = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run 1 of 1")]
    assert len(names) == 2 and names[0] == names[1]


# ------------------------------------------------------------ errors and the process


@pytest.mark.parametrize("flags, message", [
    ("--task demo --shots 99999", "argument --shots: expected 2 (one for each class) to"),
    ("--task demo --shots-per-class 9999", "argument --shots-per-class: expected at most"),
    ("--task demo --device cuda:99", "argument --device: cuda:99 cannot be used"),
    ("--task demo --device meta", "argument --device: meta cannot be used"),
    ("--task demo --device toaster", "argument --device: toaster cannot be used"),
    ("--task demo --shots 9 --noise backtranslation --noise-level 1 --translators tests tests", "--translators: tests"),
    ("--task demo --out /dev/null/runs", "argument --out: /dev/null/runs/results.jsonl cannot be written"),
    ("--task demo --out /proc/runs", "argument --out: /proc/runs/results.jsonl cannot be written"),
])
def test_errors_that_are_found_while_loading(capsys, tmp_path, flags, message):
    assert message in user_error(capsys, tmp_path, *flags.split())


def test_an_out_that_cannot_be_written_is_reported_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "fit", None)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken" / "results.jsonl").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("link", "link/deeper", "taken", "file", "n" * 300):
        error = user_error(capsys, tmp_path, "--task", "demo", "--shots", 20, "--out", tmp_path / name)
        assert "argument --out" in error and "cannot be written" in error
    assert not (tmp_path / "nowhere").exists()


def test_an_error_in_the_data_names_flag_file_and_value(capsys, tmp_path, own):
    task = own(train=[("so", "a"), ("not", "b")], test=[("what else", "c")])
    error = user_error(capsys, tmp_path, "--task", task, "--model", "demo", "--shots", 2)
    assert error.startswith("finetune.py: error: argument --task: ") and "own/test.csv" in error
    assert "label c is not one of the classes a, b" in error


def test_ranks_without_torchrun_are_an_error_of_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "start it with torchrun, or unset WORLD_SIZE" in user_error(capsys, tmp_path, "--task", "demo")


def test_ctrl_c_ends_with_one_line_and_keeps_the_records(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--shots", 20)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fit", interrupt)
    before = (tmp_path / "results.jsonl").read_bytes()
    code = finetune.main(["--task", "demo", "--shots", "20", "--seed", "5", "--out", str(tmp_path)])
    assert code == 130 and (tmp_path / "results.jsonl").read_bytes() == before
    error = capsys.readouterr().err
    assert error.startswith("interrupted") and error.count("\n") == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_and_a_terminal_that_knows_only_ascii(tmp_path, own, closed):
    rows = [(f"sch\u00f6n {i} \x1b[31m", "sch\u00f6n" if i % 2 else "h\u00e4sslich") for i in range(40)]
    task = own("jsonl", train=rows[:30], test=rows[30:])
    command = f"{sys.executable} finetune.py --task {task} --model demo --shots 8 --max-steps 2 --out {tmp_path}/out"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    redirect = f"{command} {'>&-' if closed == 'stdout' else '2>&-'}"
    done = subprocess.run(redirect, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_records(tmp_path / "out" / "results.jsonl")) == 1
    assert "\x1b" not in done.stdout


class NotebookStream:
    """A stream without `reconfigure`, such as that of a notebook."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_the_script_works_in_a_thread_and_in_a_notebook(tmp_path, monkeypatch):
    """A notebook's `%run` executes the script with a stream that cannot be reconfigured."""
    argv = ["finetune.py", "--task", "demo", "--shots", "20", "--max-steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "stdout", NotebookStream())
    statuses = []

    def execute():
        try:
            runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
        except SystemExit as stop:
            statuses.append(stop.code)

    thread = threading.Thread(target=execute)
    thread.start()
    thread.join()
    assert statuses == [0] and "test accuracy" in sys.stdout.text
    assert len(read_records(tmp_path / "results.jsonl")) == 1


@pytest.mark.parametrize("flag, status", [("--help", 0), ("--nonsense", 2)])
def test_help_and_wrong_flags_do_not_import_torch(flag, status):
    slow = ["torch", "transformers", "datasets", "sklearn", "pyarrow"]
    code = (f"import atexit, runpy, sys; sys.argv = ['finetune.py', {flag!r}]; "
            f"atexit.register(lambda: print([name for name in {slow} if name in sys.modules])); "
            "runpy.run_path('finetune.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status and done.stdout.endswith("[]\n"), done.stderr
