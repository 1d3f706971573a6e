"""What the tests share: a short run, a tiny trained checkpoint, and folders with made-up sentences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import finetune
from parts import pretrained
from parts.data import demo_data, sample
from parts.records import read_records
from parts.state import Training

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # `main` does the same
transformers.logging.disable_progress_bar()


def run(out, *flags):
    """Runs main() on the demo for four steps. Returns the records, oldest first."""
    assert finetune.main(["--task", "demo", "--max-steps", "4", "--out", str(out), *map(str, flags)]) == 0
    return read_records(Path(out, "results.jsonl"))


def parts(pooling="cls", **settings):
    """Returns the arguments of `fit` for 20 examples of the demo: model, training set, validation set, setting."""
    demo = demo_data()
    tokenizer = pretrained.load_tokenizer("demo", pooling)
    torch.manual_seed(0)
    model = pretrained.load_model("demo", pooling, demo.label_names, tokenizer, settings.pop("dropout", 0.1))
    train, validation, _ = sample(demo, 20, None, 0)
    config = {"run": "", "lam": 0.9, "tau": 0.3, "seed": 0, "steps": 3, "eval_every": 3, "lr": 1e-3, "head_lr": 1e-3,
              "batch_size": 16, "sampler": "shuffled", "precision": "fp32", "weight_decay": 0.0, "warmup_ratio": 0.0,
              "micro_batch_size": None, "compile": False}
    return model, train, validation, config | settings


def fit(model, train, validation, config, classifier_only=False):
    training = Training(model, config, classifier_only)
    finetune.fit(training, train, validation)
    return training.result


def user_error(capsys, tmp_path, *flags):
    """Runs main() with flags that it must reject. Returns the one line of the error, without notices.

    Checks the exit status, and that nothing was written.
    """
    out = tmp_path / "out"
    try:
        status = finetune.main([*map(str, flags), *([] if "--out" in flags else ["--out", str(out)])])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and not out.exists()
    (error,) = (line for line in captured.err.splitlines() if not line.startswith(("removed from", "note: ")))
    return error


def script(out, *flags, ranks=1, **options):
    """Starts finetune.py on the demo, in its own process or under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, finetune.__file__, "--task", "demo", "--out", str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def finish(process, code=0):
    """Waits for a process, checks its exit status, and returns what it printed on stdout and stderr."""
    output, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    return output, error


def without_times(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "commit")}


def snapshot(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def changed(model, before):
    """Returns the names of the weights that differ from a snapshot."""
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """One trained checkpoint per pooling, as folders."""
    folders = {}
    for pooling in ("cls", "mean"):
        out = tmp_path_factory.mktemp(pooling)
        (record,) = run(out, "--shots", 20, "--pooling", pooling, "--max-steps", 200)
        folders[pooling] = out / record["run"]
    return folders


SUBJECTS = ("the soup", "our tram", "his sister", "a kite", "that lamp", "my neighbour", "the choir", "an owl")
VERBS = ("sang", "waited", "fell", "smiled", "vanished", "turned", "slept", "shone", "left", "grew")


def sentences(n, start=0):
    """n different sentences; those of another start are others again."""
    for i in range(start, start + n):
        yield f"{SUBJECTS[i % 8]} {VERBS[i // 8 % 10]} {i} times"


def write_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="")


@pytest.fixture
def glue(tmp_path):
    """A folder in the GLUE layout: SST-2, CoLA, MNLI and MRPC, with what makes them hard to read."""
    folder = tmp_path / "glue"
    for split, n, start in (("train", 120, 0), ("dev", 40, 500)):
        rows = list(enumerate(sentences(n, start)))
        write_lines(folder / "SST-2" / f"{split}.tsv", ["sentence\tlabel", *(f"{text} \t{i % 2}" for i, text in rows)])
        write_lines(folder / "CoLA" / f"{split}.tsv", [f"src\t{i % 2}\t*\t{text}" for i, text in rows])
        names = ("entailment", "neutral", "contradiction")
        name = "dev_matched" if split == "dev" else split
        write_lines(folder / "MNLI" / f"{name}.tsv", [
            "index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2\tlabel1\tgold_label",
            *(f"{i}\t7\t7e\tfiction\t\t\t\t\t{text}\tindeed {text}\tneutral\t{names[i % 3]}" for i, text in rows)])
        write_lines(folder / "MRPC" / f"{split}.tsv", [
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            *(f"{i % 2}\t1\t2\t{text}\tso {text}" for i, text in rows)])
    return folder


@pytest.fixture
def own(tmp_path):
    """Writes a folder of one's own data: own(train=[...], test=[...], suffix="csv"), rows of (text, label)."""

    def write(suffix="csv", header="text,label", **splits):
        folder = tmp_path / "own"
        for split, rows in splits.items():
            if suffix == "jsonl":
                lines = [json.dumps(dict(zip(header.split(","), row, strict=True))) for row in rows]
            else:
                separator = "\t" if suffix == "tsv" else ","
                lines = [separator.join(map(str, row)) for row in (header.split(","), *rows)]
            write_lines(folder / f"{split}.{suffix}", lines)
        return folder

    return write
