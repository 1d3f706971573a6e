"""parts/flags.py and the flags of finetune.py: every wrong flag ends the program with one line."""

import re
import shutil

import pytest

import finetune
from conftest import user_error
from parts.flags import one_spelling


@pytest.mark.parametrize("flags, message", [
    ("--task nonsense", "argument --task: nonsense is neither a folder nor one of demo, sst2"),
    ("--task stsb", "argument --task: stsb is regression"),
    ("--task STS-B", "argument --task: STS-B is regression"),
    ("", "the following arguments are required: --task"),
    ("--task demo --shots 0", "argument --shots: expected int in [1, 1e9], got 0"),
    ("--task demo --shots -5", "argument --shots: expected int in [1, 1e9], got -5"),
    ("--task demo --shots 2.5", "argument --shots: expected int in [1, 1e9], got 2.5"),
    ("--task demo --shots 1", "argument --shots: expected at least 2, one for each class, got 1"),
    ("--task mnli --shots 2", "argument --shots: expected at least 3, one for each class, got 2"),
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
    ("--task demo --lr 1e-5 inf", "argument --lr: expected float in (0, inf), got inf"),
    ("--task demo --head-lr -1", "argument --head-lr: expected float in (0, inf), got -1"),
    ("--task demo --batch-size 0", "argument --batch-size: expected int in [1, 1e9], got 0"),
    ("--task demo --epochs 0", "argument --epochs: expected float in (0, 1e9], got 0"),
    ("--task demo --epochs 1e308", "argument --epochs: expected float in (0, 1e9], got 1e308"),
    ("--task demo --eval-every 1000000001", "argument --eval-every: expected int in [1, 1e9], got 1000000001"),
    ("--task demo --max-steps 0", "argument --max-steps: expected int in [1, 1e9], got 0"),
    ("--task demo --seed -1", "argument --seed: expected int in [0, 4294967295], got -1"),
    ("--task demo --dropout 1", "argument --dropout: expected float in [0, 1), got 1"),
    ("--task demo --noise label --noise-level 1.1", "expected a fraction for --noise label, got 1.1"),
    ("--task demo --noise label --noise-level -1", "argument --noise-level: expected float in [0, inf), got -1"),
    ("--task demo --noise backtranslation --noise-level 0", "argument --noise-level: expected a temperature above 0"),
    ("--task demo --noise label --noise-level 0.1 --translators a b", "argument --translators: needs --noise backtr"),
    ("--task demo --lam 0 0.9 --ce-temperature 0.3", "argument --ce-temperature: needs --lam 0, got --lam 0.0 0.9"),
    ("--task demo --noise label", "argument --noise: needs --noise-level"),
    ("--task demo --noise-level 0.1", "argument --noise: needs --noise-level"),
    ("--task demo --pooling max", "argument --pooling: invalid choice: 'max'"),
    ("--task demo --lamb 0.5", "unrecognized arguments: --lamb"),
    ("--task demo --max-length 2", "argument --max-length: expected int in [8, 1e9], got 2"),
    ("--task demo --data-dir .", "argument --data-dir: needs a task of sst2, cola"),
    ("--task sst2 --data-dir /nowhere", "argument --data-dir: no file /nowhere/SST-2/train.tsv"),
    ("--task demo --model ./nowhere", "argument --model: ./nowhere has no config.json"),
    ("--task demo --model tests", "argument --model: tests has no config.json"),
])
def test_a_wrong_flag_ends_the_program_with_one_line(capsys, tmp_path, flags, message):
    assert message in user_error(capsys, tmp_path, *flags.split())


@pytest.mark.parametrize("flags", ["--seed 0 --seed 1", "--seed=0 --seed 1", "--lam 0 --lr 1e-3 --lam 0.9"])
def test_a_repeated_flag_of_a_sweep_is_rejected(capsys, tmp_path, flags):
    """argparse would ignore the first values."""
    name = flags[:6].rstrip("=").strip()
    told = user_error(capsys, tmp_path, "--task", "demo", *flags.split())
    assert f"argument {name}: expected it once, with all values, for example {name} A B" in told


@pytest.mark.parametrize("flags", [["--data-dir", ""], ["--data-dir="]])
def test_an_empty_value_is_rejected(capsys, tmp_path, flags):
    """The value of a shell variable that is not set."""
    error = user_error(capsys, tmp_path, "--task", "demo", *flags)
    assert "argument --data-dir: got an empty text; expected a value" in error


@pytest.mark.parametrize("flags", [["--task", "caf\udce9"], ["--task=caf\udce9"]])
def test_a_name_that_is_not_utf8_is_rejected(capsys, tmp_path, flags):
    assert r"argument --task: caf\udce9 is not UTF-8; choose another name" in user_error(capsys, tmp_path, *flags)


def test_a_line_break_in_a_value_is_escaped(capsys, tmp_path):
    assert "argument --task: a\\nb is neither a folder nor" in user_error(capsys, tmp_path, "--task", "a\nb")


def test_minus_zero_is_zero():
    assert str(finetune.parse_args(["--task", "demo", "--lam", "-0", "0"]).lam) == "[0.0, 0.0]"


@pytest.mark.parametrize("path, expected", [
    ("b", "b"), ("b/", "b"), ("./b", "b"), ("a/../b", "b"), ("b//", "b"), ("demo", "demo"), ("./demo", "./demo"),
    ("demo/", "./demo"), ("org/model", "org/model"), ("./nowhere", "./nowhere"), ("", "")])
def test_a_folder_has_one_spelling(tmp_path, monkeypatch, path, expected):
    for name in ("a", "b", "demo"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert one_spelling(path, ("demo",)) == expected


def test_the_default_model():
    models = [finetune.parse_args(["--task", task, "--shots", "20"]).model for task in ("demo", "sst2")]
    assert models == ["demo", "FacebookAI/roberta-large"]


def test_the_help_explains_every_flag_and_names_its_default(capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = [re.search(rf"{flag} .*?(?= --[a-z]|$)", text.split("options:")[1])[0]
             for flag in ("--dropout", "--noise-level", "--lr", "--dry-run")]
    assert "dropout rate" in flags[0] and "(default: 0.1)" in flags[0] and "(no default)" in flags[1]
    assert "1e-5" in flags[2] and "stop" in flags[3]


@pytest.mark.parametrize("index", [
    "[]", "{}", '{"weight_map": {"a": "pytorch_model.bin"}}', '{"weight_map": {"a": "../model.safetensors"}}'])
def test_an_index_that_names_other_files_is_rejected(capsys, tmp_path, checkpoints, index):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["cls"], folder)
    (folder / "model.safetensors.index.json").write_text(index)
    error = user_error(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder)
    assert "argument --model" in error and "model.safetensors.index.json" in error


def test_a_mean_checkpoint_needs_its_flag(capsys, tmp_path, checkpoints):
    error = user_error(capsys, tmp_path, "--task", "demo", "--model", checkpoints["mean"])
    assert "was trained with --pooling mean" in error
