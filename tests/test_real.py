"""Tests with real GLUE data and a real encoder. GLUE_DIR is a folder in GLUE's layout, ENCODER a BERT-like model."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import transformers

import eval as evaluate
import finetune
from parts.data import sample
from parts.records import read_records
from parts.tasks import TASKS, find_files, load_data, read_glue

GLUE_DIR, ENCODER = os.environ.get("GLUE_DIR"), os.environ.get("ENCODER")
pytestmark = pytest.mark.skipif(not (GLUE_DIR and ENCODER), reason="needs GLUE_DIR and ENCODER")


@pytest.mark.parametrize("task, train, dev", [
    ("sst2", [29780, 37569], [428, 444]), ("cola", [2528, 6023], [322, 721]), ("mrpc", [1194, 2474], [129, 279]),
    ("rte", [1249, 1241], [146, 131]), ("qnli", None, [2702, 2761]), ("mnli", None, [3479, 3123, 3213]),
])
def test_every_example_is_read_with_its_label(task, train, dev):
    splits = {name: read_glue(file, TASKS[task]) for name, file in find_files(task, GLUE_DIR).items()}
    assert np.bincount(splits["test"].labels).tolist() == dev
    assert train is None or np.bincount(splits["train"].labels).tolist() == train


def test_the_splits_have_the_published_checksums():
    page = (Path(finetune.__file__).parent / "results" / "README.md").read_text(encoding="utf-8")
    published = re.findall(r"\| (\w+) \| (\d+) \| (\d+) \| `(\w{12})` \| `(\w{12})` \| `(\w{12})` \|", page)
    assert len(published) >= 6
    for task, shots, seed, *checksums in published:
        data = load_data(task, GLUE_DIR, few_shot=True)
        splits = sample(data, int(shots), None, int(seed))
        assert [split.checksum for split in splits] == checksums


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sst2_from_files_to_table(tmp_path, capsys, pooling):
    flags = ["--task", "sst2", "--data-dir", GLUE_DIR, "--model", ENCODER, "--pooling", pooling, "--lr", "2e-4"]
    short = ["--shots", "64", "--max-steps", "24", "--eval-every", "24", "--save", "--out", str(tmp_path)]
    assert finetune.main([*flags, *short, "--lam", "0", "0.9"]) == 0
    ce, scl = read_records(tmp_path / "results.jsonl")
    assert ce["train_checksum"] == scl["train_checksum"] and (ce["test_size"], ce["validation_size"]) == (436, 436)
    assert min(ce["test_accuracy"], scl["test_accuracy"]) > 0.55  # three standard errors above chance would be 0.57
    assert scl["scl_lowest"] < scl["scl"] < scl["scl_collapsed"]
    folders = [str(tmp_path / record["run"]) for record in (ce, scl)]
    assert evaluate.main(["score", folders[1]]) == 0
    assert f"{scl['test_accuracy']:.4f}" in capsys.readouterr().out
    assert evaluate.main(["tsne", *folders, "-o", str(tmp_path / "tsne.png")]) == 0
    assert evaluate.main(["table", str(tmp_path / "results.jsonl")]) == 0
    if pooling == "cls":
        classify = transformers.pipeline("text-classification", model=folders[1])
        answers = classify(["a wonderful, moving and funny film", "a dull, stupid and boring mess"])
        assert [answer["label"] for answer in answers] == ["positive", "negative"]
