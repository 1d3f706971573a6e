"""parts/records.py: the name of a run, what is printed of it, and its line in results.jsonl."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import finetune
from conftest import run
from parts.data import Split, demo_data, sample
from parts.records import append_record, base_model, configure, method_name, print_result, print_setting, read_records

ROOT = Path(finetune.__file__).parent


@functools.cache
def demo_splits(shots):
    return sample(demo_data(), shots, None, 0)


def setting(*flags, splits=None, lam=0.9, lr=None):
    """Returns the setting of a run with these flags. Without `splits`, it has 20 training examples of the demo."""
    args = finetune.parse_args(["--task", "demo", *map(str, flags)])
    return configure(args, lam, 0.3 if lam else None, lr, 0, splits or demo_splits(20), ("negative", "positive"), 64, 1)


# ------------------------------------------------------------ the setting


@pytest.mark.parametrize("flags, train_size, steps, every", [
    ((), 240, 200, 20), (("--shots", 20), 20, 200, 20), (("--epochs", "3"), 240, 45, 5),
    (("--shots", 20, "--epochs", "0.5"), 20, 1, 1), (("--max-steps", "7", "--eval-every", "3"), 240, 7, 3),
    (("--epochs", "30"), 240, 450, 45), (("--batch-size", "4"), 100, 250, 25)])
def test_steps_and_validations(flags, train_size, steps, every):
    """The default is the larger of 10 epochs and 200 steps."""
    train, validation, test = demo_splits(None)
    config = setting(*flags, splits=(train.take(np.arange(train_size)), validation, test))
    assert (config["steps"], config["eval_every"]) == (steps, every)


def test_default_learning_rates():
    assert [setting(lr=lr)["lr"] for lr in (None, 3e-5)] == [1e-3, 3e-5]
    assert setting("--model", "org/model")["lr"] == 1e-5
    assert [setting(lam=lam, lr=2e-5)["head_lr"] for lam in (0, 0.9, 1)] == [2e-5, 2e-5, 1e-3]
    assert setting("--head-lr", "0.5", lam=1)["head_lr"] == 0.5


def test_only_flags_that_change_the_result_change_the_name():
    names = {setting(*flags)["run"] for flags in ((), ("--out", "x"), ("--save",), ("--save-every", 5), ("--dry-run",),
                                                  ("--device", "cpu"), ("--max-steps", 200), ("--eval-every", 20))}
    others = {setting(*flags)["run"] for flags in ((), ("--batch-size", 8), ("--dropout", 0), ("--pooling", "mean"),
                                                   ("--micro-batch-size", 4), ("--weight-decay", 0))}
    assert len(names) == 1 and len(others) == 6
    assert {name[:-7] for name in names | others} == {"demo-n20-lam0.9-tau0.3-seed0"}


@pytest.mark.parametrize("model, expected", [
    ("demo", "demo"), ("org/model", "org/model"), ("org/model/", "org/model"),
    ("runs/sst2-n20-lam0.9-tau0.3-seed4-0a1b2c", "runs/sst2-n20"),
    ("runs/sst2-n20-lam0-seed4-0a1b2c/", "runs/sst2-n20"),
    ("runs/sst2-n20-lam0.5-tau1e-05-seed4-0a1b2c", "runs/sst2-n20"), ("runs/my-lam0-model", "runs/my-lam0-model")])
def test_two_checkpoints_of_one_setting_have_one_base_model(model, expected):
    assert base_model(model) == expected


@pytest.mark.parametrize("fields, name", [
    ({"lam": 0}, "CE"), ({"lam": 0.9}, "CE + SCL (0.9, 0.3)"), ({"lam": 1}, "SCL (0.3), then CE"),
    ({"lam": 0, "ce_temperature": 0.2}, "CE on normalised features (0.2)")])
def test_method_names(fields, name):
    assert method_name({"tau": 0.3, "ce_temperature": None} | fields) == name


# ------------------------------------------------------------ what is printed


def test_the_printed_setting(capsys):
    config = setting()
    splits = (Split([("so\nit", "and\x1b[31m"), ("no", "sch\u00f6n")], np.array([2, 0])),
              Split([("a",)] * 60, np.arange(60) % 3), Split([("a",)] * 4, np.array([0, 0, 1, 2])))
    print_setting(config, splits, ("7", "8", "9"), "a new classifier, 1.0 M parameters, on cpu", ["look"])
    assert capsys.readouterr().out.splitlines() == [
        "demo with a new classifier, 1.0 M parameters, on cpu; cls pooling, lr 0.001, 200 steps of 2 examples",
        "  train: 2 examples (7: 1, 8: 0, 9: 1)",
        "  validation: 60 examples (7: 20, 8: 20, 9: 20)",
        "  test: 4 examples (7: 2, 8: 1, 9: 1)",
        "  9: so\\nit | and\\x1b[31m",
        "  7: no | sch\u00f6n",
        "  warning: look",
        "  warning: no training example of 8, so the model cannot learn this class",
        "  this run is only a smoke test, because the encoder is tiny and starts from random weights",
    ]


def test_noise_and_many_classes_and_a_small_validation_set_are_printed(capsys):
    config = setting("--noise", "word", "--noise-level", 0.25)
    split = Split([(f"text {i}",) for i in range(12)], np.arange(12))
    print_setting(config, (split, split, split), tuple(f"class {i}" for i in range(12)), "model", [])
    printed = capsys.readouterr().out
    assert "train: 12 examples with word noise 0.25 (class 0: 1, " in printed and "test: 12 examples (class" in printed
    assert "class 8: 1, 3 more classes)" in printed and "class 9: 1" not in printed
    assert "warning: only 12 validation examples choose the checkpoint" in printed


RESULT = {"test_accuracy": 0.75, "validation_accuracy": 0.8, "best_step": 20, "seconds": 3.4, "lam": 0}


@pytest.mark.parametrize("accuracy, warned", [(0.75, False), (0.7, False), (0.65, True)])
def test_a_result_below_the_largest_class_is_warned_of(capsys, accuracy, warned):
    test = Split([("a",)] * 10, np.array([0] * 3 + [1] * 7))
    print_result(RESULT | {"test_accuracy": accuracy}, test, ("same", "dif\x1bferent"))
    result, *warnings = capsys.readouterr().out.splitlines()
    assert result == (f"test accuracy {accuracy:.3f}, validation 0.800 at step 20, 3 s; "
                      "largest class: 0.700 (dif\\x1bferent)")
    assert len(warnings) == warned
    expected = "a classifier that always predicts dif\\x1bferent is more accurate than this run"
    assert all(expected in line for line in warnings)


def test_a_run_that_ends_collapsed_is_warned_of(tmp_path, capsys, checkpoints):
    run(tmp_path, "--shots", 20)  # four steps
    printed = capsys.readouterr().out
    assert "warning: the SCL loss did not fall: scl is still near its value for equal features" in printed
    assert "; largest class: 0.510 (negative)" in printed
    trained = json.loads((checkpoints["cls"] / "record.json").read_text())
    demo = demo_data()
    print_result(trained, demo.test, demo.label_names)
    printed = capsys.readouterr().out
    assert "warning" not in printed and "; largest class: 0.510 (negative)" in printed


# ------------------------------------------------------------ results.jsonl


def test_a_torn_line_is_reported_and_the_next_record_is_complete(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    append_record(file, {"run": "a"})
    with open(file, "a") as results:
        results.write('{"run": "to')
    append_record(file, {"run": "b"})
    assert capsys.readouterr().err == ""
    assert read_records(file) == [{"run": "a"}, {"run": "b"}]
    assert capsys.readouterr().err == f"{file}, line 2 is not a record; the line was skipped\n"


def test_a_torn_record_does_not_count_as_finished(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"run": "A", "lam": 0.')
    for _ in range(2):
        append_record(file, {"run": "A", "lam": 0.9})
    assert read_records(file) == [{"run": "A", "lam": 0.9}]


def test_lines_that_are_not_records_are_skipped_and_reported_once(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    file.write_text('[1]\n5\n{"run": [1]}\n{"lam": 0}\n' + "[" * 100_000 + "\n")
    assert finetune.main(["--task", "demo", "--shots", "20", "--max-steps", "1", "--out", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert error.count("is not a record; the line was skipped") == error.count("\n") == 5
    assert len(read_records(file, quiet=True)) == 1


# ------------------------------------------------------------ the commit


def test_the_commit_belongs_to_this_code_and_not_to_a_repository_around_a_copy(tmp_path):
    shutil.copytree(ROOT / "parts", tmp_path / "parts", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    code = "from parts.records import git_commit; print(git_commit())"

    def commit():
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    assert commit() == "None"
    for command in (["add", "parts"], ["commit", "-q", "-m", "b"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
    assert commit() == head
