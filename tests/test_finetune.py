"""finetune.py from the command line to the record: what a run promises, and what it says of a mistake."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import fit, parts, run, sentences, write_lines

import data
import finetune

# ------------------------------------------------------------ a run and its record


def without_times(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "commit")}


def test_the_record_of_ce_and_scl(tmp_path):
    (record,) = run(tmp_path, "--shots", 20, "--lam", 0.5, "--tau", 0.4)
    assert (record["lam"], record["tau"], record["seed"], record["shots"], record["steps"]) == (0.5, 0.4, 0, 20, 4)
    assert (record["train_size"], record["validation_size"], record["test_size"]) == (20, 200, 300)
    assert 0 < record["scl_lowest"] <= record["scl"] and record["scl_collapsed"] == pytest.approx(math.log(15))
    assert all(0 <= record[name] <= 1 for name in ("validation_accuracy", "test_accuracy", "test_macro_f1"))
    assert record["best_step"] in range(1, 5) and record["ce"] > 0 and -1 <= record["test_mcc"] <= 1
    assert {"torch", "transformers", "commit", "device", "seconds", "lr", "model", "train_checksum"} <= set(record)
    validations = record["validation_accuracies"]
    assert [step for step, _ in validations] == [1, 2, 3, 4]
    assert record["validation_accuracy"] == max(accuracy for _, accuracy in validations)
    correct = np.unpackbits(np.frombuffer(bytes.fromhex(record["test_correct"]), np.uint8), count=300)
    assert correct.mean() == pytest.approx(record["test_accuracy"])


def test_the_same_run_alone_and_in_a_sweep_is_bit_identical(tmp_path):
    flags = ("--shots", 20, "--tau", 0.1, 0.3, "--save")
    sweep = run(tmp_path / "sweep", "--lam", 0, 0.9, "--seed", 1, 0, *flags)
    assert [(r["lam"], r["tau"], r["seed"]) for r in sweep] == [
        (0, None, 1), (0.9, 0.1, 1), (0.9, 0.3, 1), (0, None, 0), (0.9, 0.1, 0), (0.9, 0.3, 0)]
    for among in (sweep[2], sweep[3]):
        tau = among["tau"] or 0.7  # which lam 0 does not heed
        lam, seed, out = among["lam"], among["seed"], tmp_path / f"alone{tau}"
        (alone,) = run(out, "--shots", 20, "--lam", lam, "--tau", tau, "--seed", seed)
        assert without_times(alone) == without_times(among)
        weights = [folder / alone["run"] / "model.safetensors" for folder in (tmp_path / "sweep", out)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_runs_of_a_seed_are_paired_and_seeds_differ(tmp_path):
    records = run(tmp_path, "--shots", 20, "--lam", 0, 0.3, 0.9, "--seed", 0, 1)
    assert len({(r["seed"], r["train_checksum"]) for r in records}) == len({r["train_checksum"] for r in records}) == 2
    assert len({r["test_checksum"] for r in records}) == len({r["validation_checksum"] for r in records}) == 1


def test_batches_that_cannot_contrast_are_said(tmp_path, capsys):
    (record,) = run(tmp_path, "--shots", 20, "--batch-size", 2)
    assert record["scl"] == 0 and "no batch of three or more held two of a class" in capsys.readouterr().out


def test_a_run_that_ends_collapsed_says_so(tmp_path, capsys):
    for steps, said in ((4, True), (200, False)):
        run(tmp_path, "--shots", 20, "--max-steps", steps)
        printed = capsys.readouterr().out
        assert ("scl ended near its collapsed value" in printed) == said and "of test 0.510 are negative" in printed


def test_lam_0_has_neither_tau_nor_scl(tmp_path):
    (record,) = run(tmp_path, "--shots", 20, "--lam", 0)
    assert record["tau"] is None and not [name for name in record if name.startswith("scl")]


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    run(tmp_path, "--shots", 20, "--seed", 0)
    (again,) = run(tmp_path, "--shots", 20, "--seed", 0)
    printed = capsys.readouterr().out
    assert json.dumps(again) in printed and "to run it anew, delete that line of" in printed
    assert f"its checkpoint in {tmp_path / again['run']}" in printed
    assert len(run(tmp_path, "--shots", 20, "--seed", 0, 1)) == 2


def test_a_torn_line_is_reported_and_the_next_record_is_whole(tmp_path, capsys):
    run(tmp_path, "--shots", 20)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"run": "to')
    assert len(run(tmp_path, "--shots", 20, "--seed", 1)) == 2
    assert "line 2 is no record: left out" in capsys.readouterr().err


def test_a_folder_named_like_a_built_in_is_not_taken_for_it(tmp_path, own, monkeypatch):
    own(train=[(text, "abc"[i % 3]) for i, text in enumerate(sentences(60))], test=[("so", "a"), ("not", "b")])
    (tmp_path / "own").rename(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    flags = ["--shots", "9", "--max-steps", "2", "--model", "demo", "--out", "out", "--task"]
    for task in ("./demo", "demo"):
        assert finetune.main([*flags, task]) == 0
    ours, built_in = data.read_records(tmp_path / "out" / "results.jsonl")
    assert (ours["task"], ours["test_size"]) == ("./demo", 2) and built_in["test_size"] == 300
    (tmp_path / "out" / built_in["run"]).rename(tmp_path / "out" / "demo")
    monkeypatch.chdir(tmp_path / "out")
    assert finetune.parse_args(["--task", "sst2", "--model", "./demo"]).model == "./demo"


def test_rows_that_two_splits_hold_are_left_out_aloud(tmp_path, own, capsys):
    rows = [(text, i % 2) for i, text in enumerate(sentences(40))]
    folder = own(train=rows, validation=rows[3:9], test=rows[:4])
    flags = ["--task", str(folder), "--model", "demo", "--shots", "8", "--max-steps", "2", "--out"]
    assert finetune.main([*flags, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().err
    for lost in ("train, for test holds the same text: 4 of 40", "validation, for test holds the same text: 1 of 6",
                 "train, for validation holds the same text: 5 of 36"):
        assert f"left out of {lost} rows" in printed


def test_a_sweep_keeps_records_only_unless_told(tmp_path):
    run(tmp_path, "--shots", 20, "--seed", 0, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("flags, steps, every", [
    ((), 200, 20), (("--shots", 20), 200, 20), (("--epochs", "3"), 45, 5), (("--shots", 20, "--epochs", "0.5"), 1, 1),
    (("--max-steps", "7", "--eval-every", "3"), 7, 3), (("--epochs", "30"), 450, 45),
])  # fmt: skip
def test_length_and_validations(flags, steps, every):
    args = finetune.parse_args(["--task", "demo", *map(str, flags)])
    splits = data.sample(data.demo_data(), args.shots, None, 0)
    splits = (splits[0].take(np.arange(20 if args.shots else 240)), *splits[1:])
    config = finetune.configure(args, 0.9, 0.3, 0, splits)
    assert (config["steps"], config["eval_every"]) == (steps, every)


def test_ten_epochs_where_they_are_more_than_200_steps():
    args = finetune.parse_args(["--task", "demo", "--batch-size", "4"])
    splits = [data.demo_data().train.take(np.arange(100))] * 3
    assert finetune.configure(args, 0.9, 0.3, 0, splits)["steps"] == 250


# ------------------------------------------------------------ training


def changed(model, before):
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


def snapshot(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_scl_trains_the_encoder_and_not_the_classifier(pooling):
    """Two public re-implementations compute SCL on detached features: they would change no weight here."""
    model, *rest = parts(pooling, lam=1, weight_decay=0.1)
    before = snapshot(model)
    fit(model, *rest)
    moved = changed(model, before)
    assert not moved & model.classifier_names()
    assert {name for name in moved if "layer.0" in name and name.endswith("query.weight")}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_ce_and_scl_give_the_encoder_another_gradient_than_ce(pooling):
    gradients = {}
    for lam in (0.0, 0.9):
        model, train, _, config = parts(pooling)
        batch = train.take(np.arange(16))
        model.eval()
        class_logits, features = model(**model.tokenize(batch.texts))
        labels = torch.from_numpy(batch.labels)
        ce = torch.nn.functional.cross_entropy(class_logits, labels)
        ((1 - lam) * ce + lam * finetune.scl_loss(features, labels, config["tau"])).backward()
        gradients[lam] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, ce_alone in gradients[0.0].items():
        scl_part = gradients[0.9][name] - 0.1 * ce_alone
        if name in model.classifier_names():
            assert scl_part.abs().max() <= 1e-6
        elif ".layer." in name and scl_part.ndim == 2:
            assert scl_part.norm() > 1e-4 * ce_alone.norm(), name  # float32 rounds at 1e-7


def test_lam_and_ce_share_batches_start_and_dropout():
    """CE and CE + SCL start from the same weights and see the same rows: at lr 0 their CE is the same."""
    values = [fit(*parts(lam=lam, lr=0.0, head_lr=0.0))["ce"] for lam in (0.0, 0.5)]
    assert values[0] == values[1]


def test_lam_1_fits_the_classifier_in_a_second_stage_on_frozen_features(tmp_path, capsys):
    model, train, validation, config = parts(lam=1, steps=200, eval_every=200)
    fit(model, train, validation, config)
    before = snapshot(model)
    result = fit(model, train, validation, config, classifier_only=True)
    assert changed(model, before) <= model.classifier_names()
    assert result["validation_accuracy"] > 0.7
    (record,) = run(tmp_path, "--shots", 20, "--lam", 1)
    assert record["head_lr"] == 1e-3 and record["scl"] > 0 and record["validation_accuracy"] > 0
    assert "now fitting it alone, on the frozen features" in capsys.readouterr().out


def test_the_best_validation_is_kept_and_the_later_of_equals(monkeypatch):
    accuracies = iter([0.5, 0.7, 0.7, 0.6])
    monkeypatch.setattr(finetune, "accuracy_score", lambda labels, predicted: next(accuracies))
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


def test_head_lr_is_the_classifier_s():
    model, *rest = parts(lam=0.5, lr=0.0, head_lr=1e-3)
    before = snapshot(model)
    fit(model, *rest)
    assert changed(model, before) == {name for name in model.classifier_names() if name in before}


def test_dropout_is_set_and_0_is_heeded():
    demo, tokenizer = data.demo_data(), finetune.load_tokenizer("demo", "cls")
    for dropout in (0.0, 0.25):
        model = finetune.load_model("demo", "cls", demo.label_names, tokenizer, dropout)
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {dropout}


SMALL = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2}


@pytest.mark.parametrize("config", [
    transformers.AlbertConfig(**SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0),  # whole numbers
    transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2)])  # attn_pdrop and so on
def test_dropout_is_that_of_the_flag_whatever_the_architecture_calls_it(tmp_path, config):
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer = finetune.load_tokenizer("demo", "mean")
    model = finetune.load_model(str(tmp_path), "mean", data.POLARITY, tokenizer, 0.25)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def test_the_classifier_of_modernbert_reads_the_first_token(tmp_path):
    config = transformers.ModernBertConfig(**SMALL, classifier_pooling="mean", pad_token_id=0, cls_token_id=1)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer = finetune.load_tokenizer("demo", "cls")
    model = finetune.load_model(str(tmp_path), "cls", data.POLARITY, tokenizer, 0.0).eval()
    tokens = torch.arange(1, 9)[None]
    class_logits, _ = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    first = model.backbone.base_model(input_ids=tokens).last_hidden_state[:, 0]
    torch.testing.assert_close(class_logits, model.backbone.classifier(model.backbone.head(first)))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_that_would_start_from_random_weights_is_refused(tmp_path, pooling):
    model, *_ = parts()
    model.backbone.save_pretrained(tmp_path)
    weights = finetune.load_file(tmp_path / "model.safetensors")
    finetune.save_file({f"module.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(data.Mistake, match="lacks 37 weights of its encoder"):
        finetune.load_model(str(tmp_path), pooling, data.POLARITY, finetune.load_tokenizer("demo", "cls"), 0.0)


def test_code_that_comes_with_a_model_is_never_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    config = {"model_type": "ours", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to the question that transformers would ask
    assert "argument --model" in mistake(capsys, tmp_path, "--task", "demo", "--model", tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_agrees_within_its_rounding(precision):
    full = fit(*parts(lam=0.9, lr=1e-5, head_lr=1e-5))
    low = fit(*parts(lam=0.9, lr=1e-5, head_lr=1e-5, precision=precision))
    assert low["scl"] != full["scl"]
    assert low["scl"] == pytest.approx(full["scl"], rel=0.02) and low["ce"] == pytest.approx(full["ce"], rel=0.02)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_ce_temperature_is_ce_of_a_linear_classifier_on_normalised_features(tmp_path, capsys, pooling):
    flags = ["--pooling", pooling, "--ce-temperature", 0.2]
    (record,) = run(tmp_path, "--shots", 20, "--lam", 0, "--max-steps", 60, *flags)
    folder = tmp_path / record["run"]
    demo, tokenizer = data.demo_data(), finetune.load_tokenizer(str(folder), pooling)
    model = finetune.load_model(str(folder), pooling, demo.label_names, tokenizer, 0.0, ce_temperature=0.2)
    class_logits, features = finetune.predict(model, demo.test)
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    head = {name: tensor.numpy() for name, tensor in finetune.load_file(folder / "head.safetensors").items()}
    assert np.allclose(class_logits, (z / 0.2) @ head["weight"].T + head["bias"], atol=1e-5)
    assert (class_logits.argmax(axis=1) == demo.test.labels).mean() == pytest.approx(record["test_accuracy"])
    assert "was trained with --pooling mean or --ce-temperature" in mistake(
        capsys, tmp_path, "--task", "demo", "--model", folder, "--pooling", "cls")


def test_predictions_come_in_the_order_of_the_rows():
    model, _, validation, _ = parts()
    class_logits, features = finetune.predict(model, validation)
    assert (class_logits.shape, features.shape) == ((200, 2), (200, 64))
    model.eval()
    for row in (0, 57, 199):
        (alone,) = model(**model.tokenize([validation.texts[row]]))[0].detach().numpy()
        assert np.allclose(alone, class_logits[row], atol=1e-5)


@pytest.mark.parametrize("noise", ["label", "word"])
def test_noise_reaches_the_training_sample_alone(tmp_path, noise):
    clean, spoiled = (run(tmp_path, "--shots", 20, *flags)[-1]
                      for flags in ((), ("--noise", noise, "--noise-level", 0.3)))
    same = [spoiled[f"{split}_checksum"] == clean[f"{split}_checksum"] for split in ("train", "validation", "test")]
    assert same == [False, True, True]


@pytest.mark.parametrize("sampler, expected", [("shuffled", {0, 1, 2}), ("balanced", {2})])
def test_sampler_reaches_the_batches(monkeypatch, sampler, expected):
    """How many of a class that is 3 of 20 are in batches of 4."""
    counts, objective = [], finetune.Training.objective
    monkeypatch.setattr(finetune.Training, "objective", lambda self, x, z, labels: (
        counts.append(int(labels.sum())) or objective(self, x, z, labels)))
    model, train, *rest = parts(steps=30, eval_every=30, batch_size=4, sampler=sampler)
    train.labels[:] = np.arange(20) < 3
    fit(model, train, *rest)
    assert set(counts) - {3} == expected


@pytest.mark.parametrize("of", ["batches", "dropout"])
def test_what_is_random_depends_on_the_seed(of):
    """At lr 0 and with the same weights, CE differs only by which rows a batch holds, or by what is dropped."""
    settings = {"batches": {"dropout": 0.0, "batch_size": 4}, "dropout": {"batch_size": 20}}[of]
    values = [fit(*parts(lam=0.0, lr=0.0, head_lr=0.0, steps=1, eval_every=1, seed=seed, **settings))["ce"]
              for seed in (0, 1, 0)]
    assert values[0] == values[2] != pytest.approx(values[1], rel=1e-4)


def test_weight_decay_is_of_matrices_alone():
    model, *_, config = parts(weight_decay=0.1)
    for group in finetune.make_optimizer(model, config, classifier_only=False).param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.1}


def save_translator(folder, seed):
    """A tiny sequence-to-sequence model with random weights: what it says is nonsense."""
    tokenizer = finetune.load_tokenizer("demo", "cls")
    torch.manual_seed(seed)
    small = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    small |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 8)
    config = transformers.BartConfig(vocab_size=len(tokenizer), **small)
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_back_translation_adds_three_of_each_and_keeps_them(tmp_path, monkeypatch):
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
    assert again["train_checksum"] == ce["train_checksum"]  # sampled by the seed
    monkeypatch.setattr(data, "translate", None)
    third = run(out, *flags, "--noise-level", 0.7, "--lam", 0.5)[-1]  # from the disk
    assert third["train_checksum"] == ce["train_checksum"] and len(kept) == 2

    split, _, _ = data.sample(data.demo_data(), 20, None, 0)
    noisy = data.back_translate(split, 0.7, list(map(str, translators)), out, 0, torch.device("cpu"))
    assert noisy.texts[:20] == split.texts and noisy.labels[:20].tolist() == split.labels.tolist()
    assert noisy.labels[20:].tolist() == np.repeat(split.labels, 3).tolist()
    assert len({text for (text,) in noisy.texts[20:23]} - {split.texts[0][0]}) == 3


def test_back_translation_translates_both_texts_of_a_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "translate", lambda texts, model, *_: [f"{model} {text}" for text in texts])
    split = data.Split([("a", "b"), ("c", "d")], np.array([1, 0]))
    noisy = data.back_translate(split, 0.7, ["en", "de"], tmp_path, 0, torch.device("cpu"))
    assert noisy.texts == [("a", "b"), ("c", "d"), *[("de en a", "de en b")] * 3, *[("de en c", "de en d")] * 3]
    assert noisy.labels.tolist() == [1, 0, 1, 1, 1, 0, 0, 0]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(tmp_path, capsys):
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "60", "--eval-every", "1", "--warmup-ratio", "1"]
    assert finetune.main([*flags, "--lr", "1e38", "--save-every", "1", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite by step 2" in error and "keeps step 1, the best before" in error
    assert not (tmp_path / "results.jsonl").exists()
    (folder,) = tmp_path.iterdir()  # and no state, which would diverge again
    assert all(weight.isfinite().all() for weight in finetune.load_file(folder / "model.safetensors").values())


def test_ctrl_c_ends_with_one_line_and_whole_records(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--shots", 20)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fit", interrupt)
    before = (tmp_path / "results.jsonl").read_bytes()
    code = finetune.main(["--task", "demo", "--shots", "20", "--seed", "5", "--out", str(tmp_path)])
    assert code == 130 and (tmp_path / "results.jsonl").read_bytes() == before
    assert "interrupted" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------ batches


def draw(labels, size, sampler, n):
    stream = finetune.batches(np.array(labels), size, sampler, np.random.default_rng(0))
    return [next(stream) for _ in range(n)]


def test_an_epoch_sees_every_row_once_but_those_of_a_short_last_batch():
    first, second, third = draw([0] * 23, 10, "shuffled", 3)
    assert len({*first, *second}) == 20
    assert set(third) != set(first)


def test_the_only_batch_may_be_short():
    for rows in draw([0, 1, 1, 0], 16, "shuffled", 3):
        assert sorted(rows) == [0, 1, 2, 3]


def test_balanced_batches_hold_two_of_each_class():
    labels = [0] * 90 + [1] * 6 + [2] * 4
    for rows in draw(labels, 8, "balanced", 50):
        assert len(set(rows)) == 8
        assert np.bincount(np.array(labels)[rows], minlength=3).min() >= 2


def test_balanced_with_more_classes_than_room_pairs_as_many_as_fit():
    labels = np.repeat(np.arange(10), 5)
    for rows in draw(labels, 8, "balanced", 20):
        assert np.unique(labels[rows], return_counts=True)[1].tolist() == [2, 2, 2, 2]


def test_balanced_takes_a_class_of_one_once():
    for rows in draw([0, 0, 0, 1], 4, "balanced", 5):
        assert sorted(rows) == [0, 1, 2, 3]


# ------------------------------------------------------------ checkpoints


def test_a_cls_checkpoint_is_an_ordinary_classifier(checkpoints):
    classify = transformers.pipeline("text-classification", model=str(checkpoints["cls"]))
    answers = classify(["on friday evening the plot was great .", "on friday evening the plot was dull ."])
    assert [answer["label"] for answer in answers] == ["positive", "negative"]
    card, record = ((checkpoints["cls"] / file).read_text() for file in ("README.md", "record.json"))
    assert f"test accuracy {json.loads(record)['test_accuracy']:.3f}, on 300 examples" in card and "arxiv" in card
    assert "by CE + SCL (0.9, 0.3): 20 training examples" in card


def test_a_mean_checkpoint_is_an_encoder_with_a_head_beside_it(checkpoints):
    folder = checkpoints["mean"]
    record = json.loads((folder / "record.json").read_text())
    encoder, tokenizer = (auto.from_pretrained(folder) for auto in (transformers.AutoModel, transformers.AutoTokenizer))
    head = finetune.load_file(folder / "head.safetensors")
    test = data.demo_data().test
    tokens = tokenizer([text for (text,) in test.texts], padding=True, return_tensors="pt")
    hidden, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    features = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    predicted = (features @ head["weight"].T + head["bias"]).argmax(dim=1).numpy()
    assert (predicted == test.labels).mean() == pytest.approx(record["test_accuracy"])
    assert encoder.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_checkpoint_is_a_model_for_the_next_task(checkpoints, own, tmp_path, capsys, pooling):
    rows = [(text, "abc"[i % 3]) for i, text in enumerate(sentences(60))]
    folder = own(train=rows[:45], test=rows[45:])
    model = ["--model", str(checkpoints[pooling]), "--pooling", pooling]
    flags = ["--shots", "9", "--max-steps", "2", "--out", str(tmp_path / "out")]
    code = finetune.main(["--task", str(folder), *model, *flags])
    (record,) = data.read_records(tmp_path / "out" / "results.jsonl")
    assert code == 0 and record["train_size"] == 9
    assert "with a new classifier" in capsys.readouterr().out  # for three classes
    run(tmp_path / "same", "--shots", 20, *model)
    assert "with its classifier" in capsys.readouterr().out
    trained = data.demo_data().label_names, finetune.load_tokenizer(model[1], pooling)
    first, second = (finetune.load_model(model[1], pooling, *trained, 0.1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_old_checkpoint_gives_way_whole(tmp_path):
    (record,) = run(tmp_path, "--shots", 20)
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / record["run"] / "stray").touch()
    run(tmp_path, "--shots", 20)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([record["run"], "results.jsonl"])
    assert not (tmp_path / record["run"] / "stray").exists()


def save_decoder(folder):
    tokenizer = transformers.GPT2Tokenizer().train_new_from_iterator(sentences(9), vocab_size=300, show_progress=False)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=64)
    transformers.GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_decoder_serves_with_mean_pooling(tmp_path):
    save_decoder(tmp_path / "decoder")
    (record,) = run(tmp_path / "out", "--shots", 20, "--model", tmp_path / "decoder", "--pooling", "mean")
    assert record["test_accuracy"] > 0


# ------------------------------------------------------------ what a source says is not believed unseen


def demo_tokenizer():
    return finetune.load_tokenizer("demo", "cls")


def save_encoder(folder, name, tokenizer=True, **settings):
    """A tiny encoder of this architecture, with random weights and the demo's tokenizer."""
    words = demo_tokenizer()
    settings = SMALL | {"vocab_size": len(words), "pad_token_id": words.pad_token_id} | settings
    config = transformers.AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    if tokenizer:
        words.save_pretrained(folder)
    return folder


def edit_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("name", [
    "roberta", "bert", "distilbert", "electra", "xlm-roberta", "albert", "deberta", "deberta-v2", "camembert", "mpnet",
    "longformer", "big_bird", "convbert"])
def test_a_folder_without_tokenizer_files_is_refused(capsys, tmp_path, name):
    """transformers makes a tokenizer of a few tokens, to which every text is the same."""
    extra = {"embedding_size": 16} if name in ("electra", "albert", "convbert") else {}
    if name == "distilbert":
        extra = {"dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}
    folder = save_encoder(tmp_path / "model", name, tokenizer=False, **extra)
    for pooling in ("cls", "mean"):
        error = mistake(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder, "--pooling", pooling)
        assert "argument --model" in error
        assert "tokenizer" in error or (pooling == "cls" and "no cls token first" in error)


def test_texts_of_another_script_are_refused(capsys, tmp_path, own):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    folder = save_encoder(tmp_path / "model", "bert", tokenizer=False, vocab_size=7, pad_token_id=0)
    tokenizer.save_pretrained(folder)
    task = own(train=[(f"\u732b {i} \u72ac", i % 2) for i in range(20)], test=[("\u732b", 0)])
    error = mistake(capsys, tmp_path, "--task", task, "--shots", 4, "--model", folder)
    assert "knows 0 of" in error and "for this language" in error


@pytest.mark.parametrize("leak", [
    {"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True},
    {"problem_type": "multi_label_classification"}, {"attn_implementation": "org/kernel"}])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_settings_of_the_source_do_not_leak(tmp_path, leak, pooling):
    folder = save_encoder(tmp_path / "model", "roberta")
    flags = ("--shots", 20, "--model", folder, "--pooling", pooling)
    (plain,) = run(tmp_path / "plain", *flags)
    edit_config(folder, **leak)
    (record,) = run(tmp_path / "out", *flags)
    assert record["ce"] == plain["ce"] and record["test_correct"] == plain["test_correct"]
    if pooling == "cls":
        folder = str(tmp_path / "out" / record["run"])
        (answer,) = transformers.pipeline("text-classification", model=folder, top_k=None)(["the plot was great"])
        assert sum(one["score"] for one in answer) == pytest.approx(1)


@pytest.mark.parametrize("name, settings, limit", [
    ("roberta", {"max_position_embeddings": 40}, 39), ("mpnet", {"max_position_embeddings": 40}, 38),
    ("bert", {"max_position_embeddings": 40}, 40),
    ("electra", {"max_position_embeddings": 40, "embedding_size": 16}, 40),
    ("gpt2", {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, 40),
    ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, 256)])  # fmt: skip
def test_the_length_is_the_smaller_of_what_tokenizer_and_model_say(tmp_path, own, name, settings, limit):
    folder = save_encoder(tmp_path / "model", name, **settings)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    words.model_max_length = 10**30 if name == "xlnet" else 512
    words.save_pretrained(folder)
    rows = [(f"the plot was great {i} " * 90, i % 2) for i in range(30)]
    flags = ["--shots", "8", "--max-steps", "2", "--model", str(folder), "--pooling", "mean"]
    task = own(train=rows[:20], test=rows[20:])
    assert finetune.main(["--task", str(task), *flags, "--out", str(tmp_path / "out")]) == 0
    (record,) = data.read_records(tmp_path / "out" / "results.jsonl")
    assert record["max_length"] == limit


def test_more_words_than_embeddings_are_refused(capsys, tmp_path):
    folder = save_encoder(tmp_path / "model", "roberta", vocab_size=100)
    error = mistake(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder)
    assert "has 100 word embeddings for the" in error


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tmp_path):
    folder = save_encoder(tmp_path / "model", "roberta")
    (right,) = run(tmp_path / "right", "--shots", 20, "--model", folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    words.padding_side = "left"
    words.save_pretrained(folder)
    (left,) = run(tmp_path / "left", "--shots", 20, "--model", folder)
    assert left["ce"] == right["ce"] and left["test_correct"] == right["test_correct"]


@pytest.mark.parametrize("name, settings", [
    ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}), ("llama", {"num_key_value_heads": 2})])
def test_a_classifier_that_reads_another_token_than_the_first_is_refused(capsys, tmp_path, name, settings):
    folder = save_encoder(tmp_path / "model", name, **settings)
    error = mistake(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder)
    assert "reads other tokens than the first" in error and "--pooling mean" in error


@pytest.mark.parametrize("name, settings", [
    ("modernbert", {"classifier_pooling": "mean", "cls_token_id": 0, "sep_token_id": 2}),
    ("eurobert", {"classifier_pooling": "mean", "bos_token_id": 0, "eos_token_id": 2})])
def test_a_classifier_that_can_read_the_first_token_does(tmp_path, name, settings):
    if name not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    folder = save_encoder(tmp_path / "model", name, **settings)
    assert run(tmp_path / "out", "--shots", 20, "--model", folder)[0]["ce"] > 0


@pytest.mark.parametrize("name, settings, unused", [
    ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, "mask_emb"),
    ("longformer", {"attention_window": [8, 8]}, "query_global"), ("bert", {}, "pooler"),
    ("luke", {"entity_vocab_size": 10, "entity_emb_size": 8}, "entity_embeddings")])
def test_what_no_output_needs_is_not_trained(tmp_path, name, settings, unused):
    """DistributedDataParallel would wait for its gradient."""
    folder = save_encoder(tmp_path / "model", name, **settings)
    model = finetune.load_model(str(folder), "mean", data.POLARITY, finetune.load_tokenizer(str(folder), "mean"), 0.0)
    class_logits, features = model.train()(**model.tokenize([("the plot was great",), ("dull",)]))
    (class_logits.sum() + features.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert any(unused in name for name, parameter in model.named_parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("names", [("positive", "negative"), ("POSITIVE", "Negative")])
def test_the_same_classes_in_another_order_keep_their_classifier(checkpoints, tmp_path, capsys, pooling, names):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints[pooling], folder)
    plain = finetune.load_model(str(checkpoints[pooling]), pooling, data.POLARITY, demo_tokenizer(), 0.0)
    weights = "model.safetensors" if pooling == "cls" else "head.safetensors"
    tensors = finetune.load_file(folder / weights)
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias", "weight", "bias"):
        if name in tensors:
            tensors[name] = tensors[name].flip(0).contiguous()
    finetune.save_file(tensors, folder / weights, metadata={"format": "pt"})
    edit_config(folder, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    model = finetune.load_model(str(folder), pooling, data.POLARITY, demo_tokenizer(), 0.0)
    assert not model.classifier_is_new and model.backbone.config.id2label == {0: "negative", 1: "positive"}
    test = data.demo_data().test
    assert np.allclose(finetune.predict(model, test)[0], finetune.predict(plain, test)[0], atol=1e-5)


def test_classes_that_differ_in_case_alone_keep_their_classifier(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["cls"], folder)
    edit_config(folder, id2label={0: "a", 1: "A"}, label2id={"a": 0, "A": 1})
    assert not finetune.load_model(str(folder), "cls", ("a", "A"), demo_tokenizer(), 0.0).classifier_is_new


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_other_classes_get_a_new_classifier_and_it_is_said(checkpoints, tmp_path, capsys, pooling):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints[pooling], folder)
    edit_config(folder, id2label={0: "spam", 1: "ham"}, label2id={"spam": 0, "ham": 1})
    before = finetune.load_model(str(checkpoints[pooling]), pooling, data.POLARITY, demo_tokenizer(), 0.0)
    model = finetune.load_model(str(folder), pooling, data.POLARITY, demo_tokenizer(), 0.0)
    assert not torch.equal(model.last_layer().weight, before.last_layer().weight)
    run(tmp_path / "out", "--shots", 20, "--model", folder, "--pooling", pooling)
    assert "with a new classifier" in capsys.readouterr().out


@pytest.mark.parametrize("pooling, ce_temperature", [("cls", 0.2), ("mean", 0.2)])
def test_a_classifier_of_other_features_is_not_kept(checkpoints, pooling, ce_temperature):
    """That of mean pooling reads the mean as it is; these read something else of the same width."""
    folder = str(checkpoints["mean"])
    model = finetune.load_model(folder, pooling, data.POLARITY, demo_tokenizer(), 0.0, ce_temperature)
    assert model.classifier_is_new
    assert not finetune.load_model(folder, "mean", data.POLARITY, demo_tokenizer(), 0.0).classifier_is_new


def test_weights_that_are_nan_are_said_before_training(capsys, tmp_path, checkpoints):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["mean"], folder)
    head = finetune.load_file(folder / "head.safetensors")
    finetune.save_file({name: tensor * math.nan for name, tensor in head.items()}, folder / "head.safetensors")
    error = mistake(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder, "--pooling", "mean")
    assert "has weights that are NaN or infinite" in error


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "null", "{", '{"model_type": 5}', '{"vocab_size": "many"}'])
def test_a_broken_file_of_a_model_is_one_line(capsys, tmp_path, checkpoints, name, content):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["cls"], folder)
    (folder / name).write_text(content)
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "2", "--model", str(folder), "--out", str(tmp_path)]
    status = finetune.main(flags)
    errors = capsys.readouterr().err.splitlines()
    assert status == 0 or (status == 2 and len(errors) == 1 and "argument --model" in errors[0]), errors
    assert status == 2 or name != "config.json"


@pytest.mark.parametrize("index", [
    "[]", "{}", '{"weight_map": {"a": "pytorch_model.bin"}}', '{"weight_map": {"a": "../model.safetensors"}}'])
def test_an_index_that_names_other_files_is_refused(capsys, tmp_path, checkpoints, index):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["cls"], folder)
    (folder / "model.safetensors.index.json").write_text(index)
    error = mistake(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder)
    assert "argument --model" in error and "model.safetensors.index.json" in error


# ------------------------------------------------------------ what would be found after the work


def test_a_task_with_a_very_long_name(tmp_path, own):
    folder = own(train=[(text, i % 2) for i, text in enumerate(sentences(40))], test=[("so", 0), ("not so", 1)])
    long = folder.rename(tmp_path / ("t" * 250))
    flags = ["--model", "demo", "--shots", "8", "--max-steps", "2", "--save-every", "1", "--out", str(tmp_path / "out")]
    assert finetune.main(["--task", str(long), *flags]) == 0
    (record,) = data.read_records(tmp_path / "out" / "results.jsonl")
    assert (tmp_path / "out" / record["run"] / "model.safetensors").exists()


def test_an_out_that_cannot_be_written_is_said_first(capsys, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken" / "results.jsonl").mkdir(parents=True)
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "results.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name in ("link", "link/deeper", "taken", "dangling", "file", "n" * 300):
        error = mistake(capsys, tmp_path, "--task", "demo", "--shots", 20, "--out", tmp_path / name)
        assert "--out" in error or "File name too long" in error
    assert not (tmp_path / "nowhere").exists()


def test_the_name_of_a_checkpoint_may_be_taken(capsys, tmp_path):
    (record,) = run(tmp_path / "first", "--shots", 20)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / record["run"]).touch()
    flags = ["--task", "demo", "--max-steps", "4", "--shots", "20", "--out", str(tmp_path / "second")]
    assert finetune.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is a file" in error and not (tmp_path / "second" / "results.jsonl").exists()


def test_other_users_can_read_a_checkpoint(checkpoints):
    for folder in checkpoints.values():
        assert {file.stat().st_mode for file in folder.iterdir()} == {(folder / "record.json").stat().st_mode}


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_and_one_of_ascii(tmp_path, own, closed):
    rows = [(f"sch\u00f6n {i} \x1b[31m", "sch\u00f6n" if i % 2 else "h\u00e4sslich") for i in range(40)]
    task = own("jsonl", train=rows[:30], test=rows[30:])
    command = f"{sys.executable} finetune.py --task {task} --model demo --shots 8 --max-steps 2 --out {tmp_path}/out"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    redirect = f"{command} {'>&-' if closed == 'stdout' else '2>&-'}"
    root = Path(finetune.__file__).parent
    done = subprocess.run(redirect, shell=True, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(data.read_records(tmp_path / "out" / "results.jsonl")) == 1
    assert "\x1b" not in done.stdout


def test_a_step_at_full_rate_however_few_and_however_long_the_warm_up():
    model, *rest, config = parts(steps=1, eval_every=1, warmup_ratio=1.0)
    before = snapshot(model)
    fit(model, *rest, config)
    assert changed(model, before)


def test_gradients_that_all_overflow_are_no_run(tmp_path, capsys, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**120))
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "3", "--precision", "fp16", "--out", str(tmp_path)]
    assert finetune.main(flags) == 2
    assert "no step changed a weight" in capsys.readouterr().err and not (tmp_path / "results.jsonl").exists()


def test_minus_zero_is_zero():
    assert str(finetune.parse_args(["--task", "demo", "--lam", "-0", "0"]).lam) == "[0.0, 0.0]"


def test_a_diverging_run_does_not_keep_the_others_from_theirs(tmp_path, capsys, monkeypatch):
    objective = finetune.Training.objective
    monkeypatch.setattr(finetune.Training, "objective", lambda self, *rest: {
        name: value * (math.nan if self.config["seed"] == 1 else 1) for name, value in objective(self, *rest).items()})
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "4", "--seed", "0", "1", "2", "--out", str(tmp_path)]
    assert finetune.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed1" in error and "the loss is not finite" in error
    assert [record["seed"] for record in data.read_records(tmp_path / "results.jsonl")] == [0, 2]


def test_bfloat16_on_a_cpu_without_it_is_warned_of(monkeypatch, capsys):
    for capability, warned in (("AVX2", True), ("AVX512, bfloat16", False)):
        monkeypatch.setattr(finetune, "cpu_capability", lambda capability=capability: capability)
        finetune.pick_device("cpu", "bf16")
        assert ("may be much slower than fp32" in capsys.readouterr().err) == warned


def test_a_run_that_another_process_finished_meanwhile_is_not_run_again(tmp_path, monkeypatch):
    finished = run(tmp_path / "other", "--shots", 20, "--seed", 1)
    describe = finetune.describe

    def meanwhile(config, *rest):
        if config["seed"] == 0:
            (tmp_path / "out").mkdir()
            finetune.append_record(tmp_path / "out" / "results.jsonl", finished[0])
        assert config["seed"] == 0
        describe(config, *rest)

    monkeypatch.setattr(finetune, "describe", meanwhile)
    assert [record["seed"] for record in run(tmp_path / "out", "--shots", 20, "--seed", 0, 1)] == [1, 0]


def test_records_that_are_none_are_left_out(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    file.write_text('[1]\n5\n{"run": [1]}\n{"lam": 0}\n' + "[" * 100_000 + "\n")
    assert len(run(tmp_path, "--shots", 20)) == 1
    assert capsys.readouterr().err.count("is no record: left out") == 2 * 5  # once by the run


def test_the_commit_is_of_this_code_and_of_no_repository_around_a_copy(tmp_path):
    commit = ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-m", "a"]
    for command in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    for name in ("scl.py", "data.py", "finetune.py"):
        shutil.copy(Path(finetune.__file__).parent / name, tmp_path)
    code = "import finetune; print(finetune.COMMIT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", "[1, 2]", '{"a": 1}', "null", '["only one"]'])
def test_a_spoilt_back_translation_is_said(capsys, tmp_path, content, monkeypatch):
    translators = [save_translator(tmp_path / name, seed) for seed, name in enumerate(("en-de", "de-en"))]
    flags = ["--task", "demo", "--shots", "4", "--max-steps", "2", "--noise", "backtranslation", "--noise-level", "0.7",
             "--translators", *map(str, translators), "--out", str(tmp_path / "out")]
    assert finetune.main(flags) == 0
    (file,) = (tmp_path / "out").glob("backtranslation-*")
    file.write_text(content)
    (tmp_path / "out" / "results.jsonl").unlink()
    capsys.readouterr()
    assert finetune.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and file.name in error and "delete it" in error


# ------------------------------------------------------------ mistakes: one line, status 2, nothing written


def mistake(capsys, tmp_path, *flags):
    out = tmp_path / "out"
    try:
        status = finetune.main([*map(str, flags), *([] if "--out" in flags else ["--out", str(out)])])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and not out.exists()
    (error,) = [line for line in captured.err.splitlines() if not line.startswith("left out of")]  # a notice
    return error


@pytest.mark.parametrize("flags, message", [
    ("--task nonsense", "argument --task: nonsense is neither a folder nor one of demo, sst2"),
    ("--task stsb", "argument --task: stsb is regression"),
    ("--task STS-B", "argument --task: STS-B is regression"),
    ("", "the following arguments are required: --task"),
    ("--task demo --shots 0", "argument --shots: expected int in [1, inf), got 0"),
    ("--task demo --shots -5", "argument --shots: expected int in [1, inf), got -5"),
    ("--task demo --shots 2.5", "argument --shots: expected int in [1, inf), got 2.5"),
    ("--task demo --shots 1", "argument --shots: expected at least 2, one a class, got 1"),
    ("--task mnli --shots 2", "argument --shots: expected at least 3, one a class, got 2"),
    ("--task demo --shots 99999", "got 99999"),
    ("--task demo --shots-per-class 9999", "argument --shots-per-class: expected at most"),
    ("--task demo --shots 20 --shots-per-class 3", "argument --shots-per-class: not allowed with argument --shots"),
    ("--task demo --epochs 2 --max-steps 3", "argument --max-steps: not allowed with argument --epochs"),
    ("--task demo --lam 1.5", "argument --lam: expected float in [0, 1], got 1.5"),
    ("--task demo --lam 0.5 -0.1", "argument --lam: expected float in [0, 1], got -0.1"),
    ("--task demo --lam nan", "argument --lam: expected float in [0, 1], got nan"),
    ("--task demo --tau 0", "argument --tau: expected float in [1e-6, 1e6], got 0"),
    ("--task demo --tau -1", "argument --tau: expected float in [1e-6, 1e6], got -1"),
    ("--task demo --tau nan", "argument --tau: expected float in [1e-6, 1e6], got nan"),
    ("--task demo --tau inf", "argument --tau: expected float in [1e-6, 1e6], got inf"),
    ("--task demo --lr 0", "argument --lr: expected float in (0, inf), got 0"),
    ("--task demo --head-lr -1", "argument --head-lr: expected float in (0, inf), got -1"),
    ("--task demo --batch-size 0", "argument --batch-size: expected int in [1, inf), got 0"),
    ("--task demo --epochs 0", "argument --epochs: expected float in (0, inf), got 0"),
    ("--task demo --max-steps 0", "argument --max-steps: expected int in [1, inf), got 0"),
    ("--task demo --seed -1", "argument --seed: expected int in [0, 4294967295], got -1"),
    ("--task demo --dropout 1", "argument --dropout: expected float in [0, 1), got 1"),
    ("--task demo --noise label --noise-level 1.1", "expected a fraction with --noise label, got 1.1"),
    ("--task demo --noise label --noise-level -1", "argument --noise-level: expected float in [0, inf), got -1"),
    ("--task demo --noise backtranslation --noise-level 0", "argument --noise-level: expected a temperature above 0"),
    ("--task demo --noise label --noise-level 0.1 --translators a b", "argument --translators: goes with --noise"),
    ("--task demo --shots 9 --noise backtranslation --noise-level 1 --translators tests tests", "--translators: tests"),
    ("--task demo --lam 0 0.9 --ce-temperature 0.3", "argument --ce-temperature: goes with --lam 0, got --lam 0.0 0.9"),
    ("--task demo --noise label", "argument --noise: goes with --noise-level"),
    ("--task demo --noise-level 0.1", "argument --noise: goes with --noise-level"),
    ("--task demo --pooling max", "argument --pooling: invalid choice: 'max'"),
    ("--task demo --lamb 0.5", "unrecognized arguments: --lamb"),
    ("--task demo --device cuda:99", "argument --device: cuda:99 cannot be used"),
    ("--task demo --device meta", "argument --device: meta cannot be used"),
    ("--task demo --max-length 2", "argument --max-length: expected int in [8, inf), got 2"),
    ("--task demo --device toaster", "argument --device: toaster cannot be used"),
    ("--task demo --data-dir .", "argument --data-dir: goes with a named task"),
    ("--task sst2 --data-dir /nowhere", "argument --data-dir: no file /nowhere/SST-2/train.tsv"),
    ("--task demo --model ./nowhere", "argument --model: ./nowhere has no config.json"),
    ("--task demo --model tests", "argument --model: tests has no config.json"),
    ("--task demo --out /dev/null/runs", "argument --out: /dev/null cannot be written"),
    ("--task demo --out /proc/runs", "argument --out: /proc cannot be written"),
])  # fmt: skip
def test_mistakes_in_the_flags(capsys, tmp_path, flags, message):
    assert message in mistake(capsys, tmp_path, *flags.split())


GOOD = "text,label\na,0\nb,1\n"


@pytest.mark.parametrize("train, test, message", [
    (None, GOOD, "has no train file"),
    (GOOD, None, "has no test file"),
    ("", GOOD, "train.csv has no rows"),
    ("text,label\n", GOOD, "train.csv has no rows"),
    (GOOD, "text,label\n", "test.csv has no rows"),
    ("sentence,label\na,0\nb,1\n", GOOD, "train.csv, line 2 has no column text; it has sentence, label"),
    ("text,class\na,0\n", GOOD, "train.csv, line 2 has no column label; it has text, class"),
    (GOOD, "text\na\n", "test.csv, line 2 has no column label; it has text; csv is separated by commas"),
    (GOOD, "text,label\na,2\n", "test.csv, line 2: label '2' is none of the classes 0, 1"),
    ("text,label\na,0\nb,0\n", GOOD, "train.csv has one label, 0; expected two or more"),
    ("text,label\na,0\n,\nc,1\n", GOOD, "train.csv, line 3: no text"),
    ("text,label\na,0\nb\nc,1\n", GOOD, "train.csv, line 3: no label"),
    ("text,label\na,0\nb, \nc,1\n", GOOD, "train.csv, line 3: no label"),
    ("text,label\na,0\nb, and c,1\n", GOOD, "train.csv, line 3: a field too many"),
    ('text,label\na,0\n"b,1\n', GOOD, "train.csv, line 3: unexpected end"),
    (b"text,label\n\xff,0\n", GOOD, "train.csv, line 2: byte 0xff is not UTF-8; save the file as UTF-8"),
    ("text,label\na,0\nb,1\nc,2\n", GOOD, "argument --shots: expected 3 (one a class) to 1 (all of train), got 2"),
    (GOOD, "text,label\nc,0\n", "no row is left for validation"),
])  # fmt: skip
def test_mistakes_in_one_s_own_folder(capsys, tmp_path, train, test, message):
    error = own_mistake(capsys, tmp_path, {"train.csv": train, "test.csv": test})
    assert message in error and "argument --" in error


@pytest.mark.parametrize("name, content, message", [
    ("train.jsonl", '{"text": null, "label": 1}\n{"text": "a", "label": 0}\n', "train.jsonl, line 1: no text"),
    ("train.jsonl", '{"text": "a"', "expected one JSON object a line"),
    ("train.jsonl", "5\n", "train.jsonl, line 1: 5 (no object); expected one JSON object a line"),
    ("train.parquet", b"PAR1 no", "train.parquet cannot be read"),
])  # fmt: skip
def test_mistakes_in_other_formats(capsys, tmp_path, name, content, message):
    assert message in own_mistake(capsys, tmp_path, {name: content, "test.csv": GOOD})


def test_a_class_without_a_training_example_and_few_to_validate_are_told(own, tmp_path, capsys):
    rows = [(text, i % 2) for i, text in enumerate(sentences(40))]
    folder = own(train=[*rows, ("a typing error", "1 "), ("another", "11")], test=[*rows[:4], ("another", "1")])
    assert finetune.main(["--task", str(folder), "--model", "demo", "--max-steps", "2", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "warning: no training example of 11" in output and "of 1 :" not in output
    assert "warning: only 3 validation examples" in output


def test_two_files_for_one_split(capsys, tmp_path):
    error = own_mistake(capsys, tmp_path, {"train.csv": GOOD, "train.tsv": "text\tlabel\n", "test.csv": GOOD})
    assert "train.csv and train.tsv are both there; keep one" in error


def own_mistake(capsys, tmp_path, files):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return mistake(capsys, tmp_path, "--task", folder, "--model", "demo", "--shots", 2)


def test_a_glue_file_without_its_column(capsys, tmp_path, glue):
    write_lines(glue / "SST-2" / "train.tsv", ["text\tlabel", "a\t0"])
    error = mistake(capsys, tmp_path, "--task", "sst2", "--data-dir", glue, "--model", "demo")
    assert "SST-2/train.tsv, line 2 has no column sentence; it has text, label" in error


def test_a_decoder_is_refused_with_the_reason(capsys, tmp_path):
    save_decoder(tmp_path / "decoder")
    error = mistake(capsys, tmp_path, "--task", "demo", "--model", tmp_path / "decoder")
    assert "puts no cls token first (a decoder?)" in error and "--pooling mean" in error


def test_a_mean_checkpoint_is_not_taken_for_a_classifier(capsys, tmp_path, checkpoints):
    error = mistake(capsys, tmp_path, "--task", "demo", "--model", checkpoints["mean"])
    assert "was trained with --pooling mean" in error


def test_weights_that_would_need_unpickling_are_refused(capsys, tmp_path, checkpoints):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in checkpoints["cls"].iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    assert "argument --model" in mistake(capsys, tmp_path, "--task", "demo", "--model", folder)


def test_corrupt_weights(capsys, tmp_path, checkpoints):
    folder = tmp_path / "corrupt"
    folder.mkdir()
    for file in checkpoints["cls"].iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    assert "argument --model" in mistake(capsys, tmp_path, "--task", "demo", "--model", folder)


@pytest.mark.parametrize("flags", ["--task sst2", "--task demo --model nobody/nothing"])
def test_no_network_is_said_soon_with_the_ways_out(capsys, tmp_path, monkeypatch, flags):
    """Here its answer fails at once."""
    import huggingface_hub

    def unreachable():
        raise ConnectionError

    data.connect_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    error = mistake(capsys, tmp_path, *flags.split())
    assert "the hub cannot be reached" in error and "--data-dir" in error and "--task demo" in error


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch):
    """Such as a name server that hangs: no timeout of a library ends it."""
    import huggingface_hub

    class Silent:
        def head(self, *_, **__):
            threading.Event().wait()

    data.connect_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    data.connect_hub(0.1)
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    data.connect_hub.cache_clear()


def test_help_and_mistakes_do_not_wait_for_torch():
    code = "import sys; sys.argv = ['finetune.py', {!r}]; import runpy; import atexit; " \
           "atexit.register(lambda: print('torch' in sys.modules)); runpy.run_path('finetune.py', run_name='__main__')"
    for flag, status in (("--help", 0), ("--nonsense", 2)):
        root = Path(finetune.__file__).parent
        done = subprocess.run([sys.executable, "-c", code.format(flag)], capture_output=True, text=True, cwd=root)
        assert done.returncode == status and done.stdout.endswith("False\n")
