"""Executes what the README promises: its commands in an empty folder, its snippets, its tables from the records."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import eval as evaluate
import finetune
from conftest import run
from parts import flags
from scl import gather_batch, scl_loss

ROOT = Path(finetune.__file__).parent
README, RESULTS = ((ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "results/README.md"))


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for script in ("scl.py", "finetune.py", "eval.py"):
        shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "parts", folder / "parts", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_demo_commands_work_offline_in_this_order(folder):
    """Adds --max-steps to each training command."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}
    demo = [c for c in COMMANDS if "--task demo" in c or re.search(r"eval\.py.* runs-demo", c)]
    assert sum("finetune.py" in command for command in demo) >= 2
    for name in ("score", "tsne", "grid", "table", "effects", "predict"):
        assert any(f"eval.py {name}" in command for command in demo)
    for command in demo:
        command = re.sub("^pip install .* && ", "", command) + (" --max-steps 4" if "--task demo" in command else "")
        done = subprocess.run(command, shell=True, executable="/bin/bash", cwd=folder, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [
    c for c in COMMANDS if re.match(r"python (finetune|eval)\.py", c) and "--task demo" not in c])
def test_the_other_commands_parse(command, monkeypatch):
    monkeypatch.setattr(flags, "find_files", lambda *_: {})
    monkeypatch.setattr(flags, "check_model_folder", lambda *_: None)
    _, script, *argv = shlex.split(command)
    {"finetune.py": finetune.parse_args, "eval.py": evaluate.parse_args}[script](argv)


def snippet(word):
    (found,) = (code for code in blocks("python") if word in code)
    return found


def test_the_snippets_print_their_comments(folder):
    snippets = [code for code in blocks("python") if "print(" in code]
    assert len(snippets) == 2
    for code in snippets:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        expected = re.findall(r"print\(.*\)  # (.*)", code)
        assert expected and done.stdout.splitlines() == expected, done.stderr


def test_the_snippet_without_the_command_line_works():
    code = snippet("load_data").replace("my_reviews", "demo").replace("all-MiniLM-L6-v2", "demo")
    exec(code, names := {})
    assert names["class_logits"].shape == (20, 2) and names["features"].shape == (20, 64)


def test_the_snippet_for_trainer_trains_with_eq_1(tmp_path):
    pytest.importorskip("accelerate")  # only Trainer needs it
    exec(snippet("Trainer"), names := {})
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5))
    rows = [{"input_ids": [0, 4 + i % 2, 6 + i, 2], "attention_mask": [1] * 4, "labels": i % 2} for i in range(24)]
    trainer = names["SCLTrainer"](
        model, transformers.TrainingArguments(
            tmp_path, max_steps=20, per_device_train_batch_size=8, per_device_eval_batch_size=8, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no"),
        train_dataset=rows, eval_dataset=rows, data_collator=transformers.default_data_collator)

    inputs = transformers.default_data_collator(rows[:8])
    model.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
        labels = inputs.pop("labels")
        cls = model.roberta(**inputs).last_hidden_state[:, 0]
        expected = 0.1 * torch.nn.functional.cross_entropy(outputs["logits"], labels) + 0.9 * scl_loss(cls, labels, 0.3)
    torch.testing.assert_close(loss, expected)

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    prediction = trainer.predict(rows)
    assert prediction.metrics["test_loss"] < before - 0.1
    assert prediction.predictions.shape == (24, 2)
    assert (prediction.predictions.argmax(axis=1) == prediction.label_ids).all()


def test_the_snippet_for_several_processes_works_in_one_process(folder):
    names = {"gather_batch": gather_batch} | {name: torch.zeros(2) for name in ("class_logits", "features", "labels")}
    exec(snippet("gather_batch"), names)
    assert names["features"].shape == (2,)


def test_every_flag_of_the_readme_exists():
    parser_flags = set(re.findall(r'add\("(--[a-z-]+)"', (ROOT / "finetune.py").read_text()))
    readme_flags = set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", README))
    others = {"--help", "--no-deps", "--nproc-per-node", "--nnodes", "--rdzv-endpoint"}  # of pip and torchrun
    assert "--pooling" in readme_flags and readme_flags <= parser_flags | others


def test_the_tables_equal_the_output_of_eval(capsys, monkeypatch):
    """Compares the rows and the summary below each `python eval.py table results/...` character by character."""
    monkeypatch.chdir(ROOT)
    tables = re.compile(r"^python eval.py (table results/.*)$", flags=re.MULTILINE)
    commands = [(page, command) for page in (README, RESULTS) for command in tables.findall(page)]
    assert commands
    for page, command in commands:
        assert evaluate.main(shlex.split(command)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "\n".join(line for line in lines if line.startswith("|")) in page
        assert next(line for line in lines if re.match(r"\d+ runs?\. ", line)) in page
        assert all(line in page for line in lines if "pairs of runs" in line)


@pytest.mark.parametrize("command", ["results/baselines.py table", "results/decision.py"])
def test_the_tables_of_the_scripts_equal_their_output(command):
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() in RESULTS, done.stderr


def test_every_command_of_the_experiments_parses(monkeypatch):
    monkeypatch.setattr(flags, "find_files", lambda *_: {})
    monkeypatch.setattr(flags, "check_model_folder", lambda *_: None)
    printed = subprocess.run(["bash", "results/experiments.sh"], cwd=ROOT, capture_output=True, text=True).stdout
    commands = printed.splitlines()
    assert len(commands) > 40
    for command in commands:
        finetune.parse_args(shlex.split(command)[2:])


def test_last_step_also_saves_the_weights_of_the_last_step(tmp_path, monkeypatch):
    common = ["--shots", "20", "--max-steps", "60"]
    (last_only,) = run(tmp_path / "a", *common, "--eval-every", "60")
    monkeypatch.setattr(finetune.Training, "restore_best", finetune.Training.restore_best)  # the script replaces it
    flags = ["--task", "demo", *common, "--eval-every", "10", "--out", str(tmp_path / "b")]
    monkeypatch.setattr(sys, "argv", ["last_step.py", *flags])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "results" / "last_step.py"))
    files = (*(tmp_path / "b").glob("*/model.safetensors"), *(tmp_path / "b-last").glob("*/model.safetensors"))
    best, last = (file.read_bytes() for file in files)
    assert best != last == (tmp_path / "a" / last_only["run"] / "model.safetensors").read_bytes()
    (saved,) = (json.loads(file.read_text()) for file in (tmp_path / "b-last").glob("*/record.json"))
    assert (saved["best_step"], saved["validation_accuracy"]) == (60, last_only["validation_accuracy"])


def test_last_step_saves_no_weights_that_diverged(tmp_path, monkeypatch):
    """Warm-up makes the learning rate of the second step too high. The first validation is at step 1."""
    monkeypatch.setattr(finetune.Training, "restore_best", finetune.Training.restore_best)
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "2", "--warmup-ratio", "0.5", "--eval-every", "1",
             "--lr", "1e30", "--out", str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", ["last_step.py", *flags])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(ROOT / "results" / "last_step.py"))
    assert len(list(tmp_path.glob("a/*/model.safetensors"))) == 1 and not (tmp_path / "a-last").exists()
