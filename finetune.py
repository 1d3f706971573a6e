"""Fine-tune an encoder with cross-entropy + supervised contrastive loss (Gunel et al., ICLR 2021).

    python finetune.py --task demo --shots 20 --lam 0.9 --tau 0.3       # made-up sentences: no network, ten seconds
    python finetune.py --task sst2 --shots 20 --lam 0.9 --tau 0.3       # RoBERTa-Large and SST-2 from the hub
    python finetune.py --task sst2 --shots 20 --lam 0 0.9 --seed 0 1 2  # a sweep: six runs, paired by seed
    torchrun --nproc-per-node 8 finetune.py --task mnli --batch-size 256 --micro-batch-size 16 --save-every 500

A datum walks one way: row of text -> Split -> Encoded -> class logits and features -> loss -> record.
A finished run is one JSON line in OUT/results.jsonl and, unless it is one of a sweep, a checkpoint in OUT/<run>/.
"""

import argparse
import contextlib
import csv
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Task(NamedTuple):
    """A text classification task: where it lives on the hub, and in a folder of the classic GLUE layout."""

    folder: str
    config: str | None  # on the hub
    hub_text: tuple[str, ...]  # columns
    labels: tuple[str, ...]  # in the order of their numbers
    text: tuple[str, ...] = ()  # columns of the local file, where they are others than on the hub
    label: str = "label"
    test: str = "dev"  # local file; GLUE keeps its test labels, so its validation set serves for test
    header: tuple[str, ...] | None = None  # for a local file without
    hub: str = "nyu-mll/glue"  # "" for a folder of one's own


SENTENCE, PAIR, POLARITY = ("sentence",), ("sentence1", "sentence2"), ("negative", "positive")
ENTAILMENT, NLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
TASKS = {
    "sst2": Task("SST-2", "sst2", SENTENCE, POLARITY),
    "cola": Task("CoLA", "cola", SENTENCE, ("unacceptable", "acceptable"),
                 header=("source", "label", "mark", "sentence")),
    "mrpc": Task("MRPC", "mrpc", PAIR, ("not_equivalent", "equivalent"), ("#1 String", "#2 String"), "Quality"),
    "rte": Task("RTE", "rte", PAIR, ENTAILMENT),
    "qnli": Task("QNLI", "qnli", ("question", "sentence"), ENTAILMENT),
    "mnli": Task("MNLI", "mnli", ("premise", "hypothesis"), NLI, PAIR, "gold_label", "dev_matched"),
    "qqp": Task("QQP", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), label="is_duplicate"),
    "wnli": Task("WNLI", "wnli", PAIR, ("not_entailment", "entailment")),
    "amazon_polarity": Task("AmazonPolarity", None, ("content",), POLARITY, ("text",), test="test",
                            hub="fancyzhx/amazon_polarity"),
    "yelp_polarity": Task("YelpPolarity", None, ("text",), POLARITY, test="test", hub="fancyzhx/yelp_polarity"),
}
BUILT_IN = ("demo", *TASKS)  # never a folder
DEFAULT_MODEL = "FacebookAI/roberta-large"
TRANSLATORS = ["Helsinki-NLP/opus-mt-en-de", "Helsinki-NLP/opus-mt-de-en"]
SPLIT_SEED = 0  # cuts test and validation, the same for every --seed
EVAL_BATCH = 64
MACHINE_FLAGS = ("data_dir", "device", "out", "save", "save_every")  # they do not change what a run finds


class Mistake(Exception):
    """What the user can mend, told in one line."""


class Diverged(Exception):
    """At this step the loss or the class logits were not finite."""


# ------------------------------------------------------------ flags: before the slow imports, so that --help is instant


def number(kind: type, interval: str):
    """An argparse type: a number in an interval such as "[0, 1]" or "(0, inf)"; NaN is in none."""
    low, high = map(float, interval[1:-1].split(","))
    excluded = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "()"]

    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value not in excluded:
                return value
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} in {interval}, got {text}")

    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # argparse would print the usage first


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    count, fraction = number(int, "[1, inf)"), number(float, "[0, 1]")
    positive, not_negative = number(float, "(0, inf)"), number(float, "[0, inf)")

    add = parser.add_argument_group("data").add_argument
    add("--task", required=True, help=f"{', '.join(TASKS)}; demo; or a folder with train.*, test.*, perhaps "
        "validation.* (tsv, csv, jsonl, parquet; columns text, label, perhaps text_pair)")
    add("--data-dir", help="read a named task from DIR/SST-2/train.tsv and so on, GLUE's layout, not from the hub")
    add("--shots", type=count, help="training examples in total, stratified (default: all)")
    add("--shots-per-class", type=count, help="training examples of each class")
    add("--noise", choices=("label", "word", "backtranslation"), help="of the training sample: flip labels; drop and "
        "swap words; or add three back-translations of each example")
    add("--noise-level", type=not_negative, help="which fraction of labels or words; which temperature of translation")
    add("--translators", nargs=2, metavar=("EN_DE", "DE_EN"), help="hub ids or folders of two sequence-to-sequence "
        f"models (default: {' '.join(TRANSLATORS)})")
    add("--max-length", type=number(int, "[8, inf)"), default=256, help="tokens, or the model's limit (default: 256)")

    add = parser.add_argument_group("method (of several values every combination runs)").add_argument
    add("--lam", type=fraction, nargs="+", default=[0.9], help="weight of SCL against CE in Eq. 1; 0 is CE alone; 1 "
        "fits the classifier afterwards, on frozen features (default: 0.9)")
    add("--tau", type=number(float, "[1e-6, inf)"), nargs="+", default=[0.3], help="temperature of SCL (default: 0.3)")
    add("--seed", type=number(int, "[0, 4294967295]"), nargs="+", default=[0], help="of sample, weights, batches, "
        "dropout (default: 0)")
    add("--ce-temperature", type=positive, metavar="T", help="with --lam 0: CE of a linear classifier on l2-normalised "
        "features over T, to tell what normalising alone does")

    add = parser.add_argument_group("model").add_argument
    add("--model", help=f"hub id or folder of an encoder (default: {DEFAULT_MODEL}; for demo: a tiny random one)")
    add("--pooling", choices=("cls", "mean"), default="cls", help="features: the last layer at the first token, with "
        "the model's own classifier (the paper's, the default); or its mean over tokens, with a linear one")
    add("--dropout", type=number(float, "[0, 1)"), default=0.1, help="default: %(default)s")

    add = parser.add_argument_group("training (defaults: the paper's, else fairseq's for GLUE)").add_argument
    add("--lr", type=positive, help="peak learning rate (default: 1e-5; demo model: 1e-3)")
    add("--head-lr", type=positive, help="of the classifier (default: --lr; with --lam 1: 1e-3)")
    add("--batch-size", type=count, default=16, help="what SCL contrasts, over all processes (default: %(default)s)")
    add("--micro-batch-size", type=count, help="of each process at once: less memory, a second forward pass")
    add("--epochs", type=positive, help="default: 10, but at least 200 steps")
    add("--max-steps", type=count, help="length in steps instead")
    add("--eval-every", type=count, help="steps from one validation to the next (default: a tenth of all)")
    add("--weight-decay", type=not_negative, default=0.1, help="default: %(default)s")
    add("--warmup-ratio", type=fraction, default=0.06, help="of the steps, then linear decay (default: %(default)s)")
    add("--sampler", choices=("shuffled", "balanced"), default="shuffled", help="balanced: at least two examples "
        "of a class in every batch, of as many classes as fit (default: %(default)s)")

    add = parser.add_argument_group("machine and output").add_argument
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder; SCL is always in "
        "float32 (default: %(default)s)")
    add("--compile", action="store_true", help="the encoder by torch.compile: for long runs")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--out", default="runs", help="folder of records and checkpoints (default: %(default)s)")
    add("--save", action="store_true", help="keep the checkpoints of a sweep, too")
    add("--save-every", type=count, metavar="S", help="write all state every S steps: the same command goes on there")

    args = parser.parse_args(argv)
    for one, other in (("shots", "shots_per_class"), ("epochs", "max_steps")):
        if getattr(args, one) and getattr(args, other):
            parser.error(f"argument --{one}: not together with --{other.replace('_', '-')}; choose one")
    if (args.noise is None) != (args.noise_level is None):
        parser.error("argument --noise: goes with --noise-level, such as --noise label --noise-level 0.1 (a fraction) "
                     "or --noise backtranslation --noise-level 0.7 (a temperature)")
    if args.noise == "backtranslation":
        args.translators = args.translators or TRANSLATORS
    elif args.translators:
        parser.error("argument --translators: goes with --noise backtranslation")
    if args.noise and (args.noise_level == 0 if args.translators else args.noise_level > 1):
        wanted = "a temperature above 0" if args.translators else "a fraction"
        parser.error(f"argument --noise-level: expected {wanted} with --noise {args.noise}, got {args.noise_level:g}")
    if args.ce_temperature and any(args.lam):
        parser.error(f"argument --ce-temperature: goes with --lam 0, got --lam {' '.join(map(str, args.lam))}")
    classes = len(TASKS[args.task].labels) if args.task in TASKS else 2
    if args.shots and args.shots < classes:
        parser.error(f"argument --shots: expected at least {classes}, one a class, got {args.shots}")
    args.model = args.model or ("demo" if args.task == "demo" else DEFAULT_MODEL)
    try:
        task_files(args.task, args.data_dir)
        check_model_folder(args.model, args.pooling == "cls" and not args.ce_temperature)
        check_writable(Path(args.out))
    except Mistake as mistake:
        parser.error(str(mistake))
    for name in ("task", "model"):  # one spelling of a relative folder; ./demo is not the demo
        if (given := getattr(args, name)) not in BUILT_IN and os.path.isdir(given):
            path = os.path.normpath(given)
            setattr(args, name, f"./{path}" if path in BUILT_IN else path)
    return args


def task_files(task: str, data_dir: str | None) -> dict[str, Path]:
    """The local files of a task by split; none for demo, nor for what comes from the hub."""
    if task.lower().replace("-", "") == "stsb":
        raise Mistake(f"argument --task: {task} is regression, and SCL needs classes; mrpc and qqp are such pairs")
    if data_dir and task not in TASKS:
        raise Mistake(f"argument --data-dir: goes with a named task ({', '.join(TASKS)}), not with --task {task}")
    if data_dir:
        folder = Path(data_dir, TASKS[task].folder)
        files = {"train": folder / "train.tsv", "test": folder / f"{TASKS[task].test}.tsv"}
        for file in files.values():
            if not file.is_file():
                raise Mistake(f"argument --data-dir: no file {file}; expected GLUE's layout, DIR/SST-2/train.tsv")
        return files
    if task in BUILT_IN:
        return {}
    if not Path(task).is_dir():
        raise Mistake(f"argument --task: {task} is neither a folder nor one of demo, {', '.join(TASKS)}")
    suffixes, files = (".tsv", ".csv", ".jsonl", ".parquet"), {}
    for split in ("train", "validation", "test"):
        found = [file for suffix in suffixes if (file := Path(task, split + suffix)).is_file()]
        if len(found) > 1:
            raise Mistake(f"argument --task: {found[0]} and {found[1].name} are both there; keep one")
        if found:
            files[split] = found[0]
        elif split != "validation":
            raise Mistake(f"argument --task: {task} has no {split} file; expected {split} with {', '.join(suffixes)}")
    return files


def check_model_folder(model: str, own_classifier: bool) -> None:
    folder = Path(model)
    is_local = folder.is_dir() or model.count("/") > 1 or model[0] in "./~"  # not a hub id
    if is_local and model != "demo" and not (folder / "config.json").is_file():
        raise Mistake(f"argument --model: {model} has no config.json; expected a hub id or a save_pretrained folder")
    if own_classifier and (folder / "head.safetensors").is_file():
        raise Mistake(f"argument --model: {model} was trained with --pooling mean or --ce-temperature; say so")


def check_writable(folder: Path) -> None:
    folder = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Mistake(f"argument --out: {folder} cannot be written ({error.strerror}); choose another") from None


if __name__ == "__main__":
    parse_args()  # a mistake in the flags ends here, before torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"interrupted\n") and 130))  # during the imports

import huggingface_hub
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from tqdm import tqdm

from scl import gather_batch, scl_bounds, scl_loss

# ------------------------------------------------------------ data: rows of text -> Splits


@dataclass(frozen=True, eq=False)
class Split:
    texts: list[tuple[str, ...]]  # (text,) or (text, text_pair)
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        return Split([self.texts[row] for row in rows], self.labels[rows])

    def draw(self, n: int | list[int], seed: int = SPLIT_SEED) -> "Split":
        """A stratified draw of at most n rows, or of n[c] from each class c: a pure function of its arguments."""
        rng = np.random.default_rng(seed)
        shares = n if isinstance(n, list) else allot(np.bincount(self.labels, minlength=1), min(n, len(self)))
        rows = [rng.permutation(np.flatnonzero(self.labels == label))[:share] for label, share in enumerate(shares)]
        return self.take(np.sort(np.concatenate(rows)))

    def without(self, other: "Split") -> "Split":
        """The rows whose text, case and white space aside, is not in the other."""
        own, others = ([tuple(" ".join(text.lower().split()) for text in row) for row in split.texts]
                       for split in (self, other))
        seen = set(others)
        return self.take(np.array([row for row, key in enumerate(own) if key not in seen], dtype=int))

    @functools.cached_property
    def checksum(self) -> str:
        rows = ("\t".join((*text, str(label))) for text, label in zip(self.texts, self.labels, strict=True))
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:12]


class Data(NamedTuple):
    """A task before sampling; validation None: to be cut from what the sample leaves of train."""

    train: Split
    validation: Split | None
    test: Split
    label_names: tuple[str, ...]


def read_rows(file: Path, header: tuple[str, ...] | None = None) -> list[dict]:
    """The rows of a tsv, csv, jsonl or parquet file, by column; a field too few is None, one too many has the key None.

    tsv is GLUE's: nothing is quoted and only "\n" ends a line, since texts hold bare quotes and U+0085.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_table(file).to_pylist()
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                return list(csv.DictReader(lines, strict=True))
            if file.suffix == ".jsonl":
                return [dict(json.loads(line)) for line in lines.read().split("\n") if line.strip()]
            tsv = (line.removesuffix("\r").replace("\r", " ") for line in lines.read().split("\n"))
            return list(csv.DictReader(tsv, header, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (ValueError, TypeError, OSError, csv.Error) as error:  # json's and arrow's are ValueErrors
        raise Mistake(f"{file} cannot be read as {file.suffix[1:]}: {str(error).splitlines()[0]}") from None


def read_split(file: Path, task: Task) -> Split:
    rows, columns = read_rows(file, task.header), [*(task.text or task.hub_text), task.label]
    if missing := [column for column in columns if rows and not any(column in row for row in rows)]:
        raise Mistake(f"{file} has no column {missing[0]}; it has {', '.join(map(str, rows[0]))}")
    numbers = {str(label): label for label in range(len(task.labels))} if task.hub else {}  # GLUE writes 0 or a name
    numbers |= {name: label for label, name in enumerate(task.labels)}
    texts, labels = [], []
    for number, row in enumerate(rows, start=1):
        values = ["" if row.get(column) is None else str(row[column]) for column in columns]
        values = [value.encode(errors="replace").decode() for value in values]  # half an emoji, in json, is no text
        empty = [column for column, value in zip(columns, values, strict=True) if not value.strip()]
        if task.hub and (None in row or None in map(row.get, columns) or task.label in empty):
            continue  # QQP has a few such rows; the hub's copy leaves them out, too
        if not task.hub and (empty or None in row):
            reason = f"no {empty[0]}" if empty else "a field too many; quote the commas of a text"
            raise Mistake(f"{file}, row {number} below the header: {reason}")
        *text, word = *values[:-1], values[-1].strip()
        if word not in numbers:
            of = "the classes of train, " if not task.hub else ""
            raise Mistake(f"{file}, row {number}: label {word!r} is none of {of}{', '.join(task.labels[:9])}")
        texts.append(tuple(text))
        labels.append(numbers[word])
    if not labels:
        raise Mistake(f"{file} has no rows")
    if len(labels) < len(rows):
        print(f"left out of {file}, for a field is missing or too many: {len(rows) - len(labels)} of {len(rows)} rows")
    return Split(texts, np.array(labels))


def own_task(train: Path) -> Task:
    """A task in a folder of one's own: its classes are those of the train file."""
    rows = read_rows(train)
    labels = sorted({str(row["label"]).strip() for row in rows if row.get("label") not in (None, "")} - {""})
    with contextlib.suppress(ValueError):
        labels.sort(key=int)
    if len(labels) == 1:
        raise Mistake(f"{train} has one label, {labels[0]}; expected two or more")
    text = ("text", "text_pair") if any("text_pair" in row for row in rows) else ("text",)
    return Task("", None, text, tuple(labels), hub="")


def load_data(task: str, data_dir: str | None, few_shot: bool) -> Data:
    """All that is not drawn by seed. No text of test is in validation, and none of either in train.

    GLUE, few shots: the official validation set, cut once: half is test, at most 500 of the rest validate.
    GLUE, all of train: it is the test set; validation is cut from train, of the same size, at most a tenth.
    Amazon and Yelp: test is a draw of 10,000 from the official one; one's own folder: test is its file.
        Validation is its file, or cut from train as above or, with few shots, by `sample` from what they leave.
    """
    if task == "demo":
        return demo_data()
    files = task_files(task, data_dir)
    with blame("--data-dir" if data_dir else "--task", TASKS[task].hub if task in TASKS else task, "a data set"):
        spec = TASKS.get(task) or own_task(files["train"])
        splits = {name: read_split(file, spec) for name, file in files.items()} or load_hub(spec)
    train, test, validation = splits["train"], splits["test"], splits.get("validation")
    if spec.hub and spec.test == "test":
        test = test.draw(10_000)
    elif spec.hub and few_shot:
        official, test = test, test.draw(len(test) // 2)
        validation = official.without(test).draw(500)
    train = apart("train", train, "test", test)
    if validation is not None:
        validation = apart("validation", validation, "test", test)
        train = apart("train", train, "validation", validation)
    elif not few_shot:
        validation = train.draw(min(len(test), len(train) // 10))
        train = train.without(validation)
    return Data(train, validation, test, spec.labels)


def apart(name: str, split: Split, other_name: str, other: Split) -> Split:
    """The rows whose text is not in the other; says how many are left out."""
    kept = split.without(other)
    if lost := len(split) - len(kept):
        print(f"left out of {name}, for {other_name} holds the same text: {lost} of {len(split)} rows")
    return kept


def load_hub(task: Task) -> dict[str, Split]:
    connect_hub()
    import datasets  # a second, for those who need it; and it looks only now whether the hub is there

    datasets.disable_progress_bars()
    splits = {}
    for split, name in (("train", "train"), ("test", task.test.replace("dev", "validation"))):
        part = datasets.load_dataset(task.hub, task.config, split=name)
        texts = zip(*(part[column][:] for column in task.hub_text), strict=True)
        splits[split] = Split(list(texts), np.array(part["label"][:]))
    return splits


@functools.cache
def connect_hub(seconds: float = 8) -> None:
    """Asks the hub once. No answer: its own cache serves, without the 23 s that it would retry for every file."""

    def ask() -> None:
        with contextlib.suppress(Exception):  # network, proxy, certificate: all of them mean no answer
            answers.append(huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds))

    answers: list = []
    thread = threading.Thread(target=ask, daemon=True)  # since a name server that hangs heeds no timeout
    thread.start()
    thread.join(seconds)
    if not answers:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def blame(flag: str, name: str, instead: str):
    """Tells what goes wrong inside, with what the flag named, in one line and with what would do."""
    try:
        yield
    except Mistake as mistake:
        raise Mistake(f"argument {flag}: {mistake}") from None
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, ImportError, SafetensorError) as error:
        if huggingface_hub.is_offline_mode() and flag != "--device" and not os.path.exists(name):
            raise Mistake(f"argument {flag}: the hub cannot be reached and {name} is not in its cache, nor a folder; "
                          "ways out: --data-dir with GLUE, --model, --translators with folders, --task demo") from None
        reason = str(error).strip().split("\n")[0]
        raise Mistake(f"argument {flag}: {name} cannot be used ({reason}); expected {instead}") from None


def allot(sizes: np.ndarray, n: int) -> np.ndarray:
    """Shares n out among classes in proportion to their sizes (largest remainders), to each one before any gets two."""
    shares, quotas = np.zeros_like(sizes), sizes * n / max(sizes.sum(), 1)
    for _ in range(n):
        claims = quotas - shares + n * (shares == 0)
        claims[shares == sizes] = -np.inf
        shares[np.argmax(claims)] += 1
    return shares


def sample(data: Data, shots: int | None, shots_per_class: int | None, seed: int) -> tuple[Split, Split, Split]:
    """(train, validation, test) with no text in two of them. lam and tau play no part: runs of a seed are paired."""
    pool, validation, test, names = data
    if not (shots or shots_per_class):
        assert validation is not None  # load_data cuts one
        return pool, validation, test
    if shots and not len(names) <= shots <= len(pool):
        bounds = f"{len(names)} (one a class) to {len(pool)} (all of train)"
        raise Mistake(f"argument --shots: expected {bounds}, got {shots}")
    sizes = np.bincount(pool.labels, minlength=len(names))
    if shots_per_class and shots_per_class > sizes.min():
        raise Mistake(f"argument --shots-per-class: expected at most {sizes.min()} (what train has of "
                      f"{names[sizes.argmin()]}), got {shots_per_class}")
    train = pool.draw(shots or [shots_per_class or 0] * len(names), seed)
    return train, pool.without(train).draw(500) if validation is None else validation, test


def add_noise(split: Split, kind: str, level: float, num_classes: int, seed: int) -> Split:
    """The sample with this fraction of its labels flipped, or of its words dropped or swapped."""
    rng = np.random.default_rng([seed, 1])
    if kind == "label":
        labels, rows = split.labels.copy(), rng.permutation(len(split))[: round(level * len(split))]
        labels[rows] = (labels[rows] + rng.integers(1, num_classes, len(rows))) % num_classes
        return Split(split.texts, labels)

    def spoil(text: str) -> str:
        words = text.split()
        dropped: set[int] = set()
        for i in rng.permutation(len(words))[: round(level * len(words))]:
            if rng.random() < 0.5 and len(dropped) < len(words) - 1:
                dropped.add(i)
            else:
                j = rng.integers(len(words))
                words[i], words[j] = words[j], words[i]
        return " ".join(word for i, word in enumerate(words) if i not in dropped)

    return Split([tuple(map(spoil, row)) for row in split.texts], split.labels)


def back_translate(split: Split, temperature: float, translators: list[str], out: Path, seed: int,
                   device: torch.device, copies: int = 3) -> Split:  # fmt: skip
    """Every example, and three sampled translations of it to German and back (the paper's Table 3).

    They are kept in OUT under a digest of the sample, the seed, the temperature and the models.
    """
    key = hashlib.sha256(json.dumps([split.checksum, seed, temperature, translators]).encode())
    file = out / f"backtranslation-{key.hexdigest()[:12]}.json"
    if not file.is_file():
        texts = [text for row in split.texts for _ in range(copies) for text in row]
        for model in translators:
            torch.manual_seed(seed)
            texts = translate(texts, model, temperature, device)
        with whole(file) as part:
            part.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    texts, width = json.loads(file.read_text(encoding="utf-8")), len(split.texts[0])
    rows = [tuple(texts[start : start + width]) for start in range(0, len(texts), width)]
    return Split(split.texts + rows, np.concatenate([split.labels, split.labels.repeat(copies)]))


@torch.inference_mode()
def translate(texts: list[str], model: str, temperature: float, device: torch.device) -> list[str]:
    """Sampled from all that a sequence-to-sequence model finds likely, at this temperature."""
    if not os.path.isdir(model):
        connect_hub()
    with blame("--translators", model, "a sequence-to-sequence model with safetensors"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        translator = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False).to(device).eval()
    results = []
    for start in tqdm(range(0, len(texts), EVAL_BATCH), f"translating by {model}", leave=False):
        tokens = tokenizer(texts[start : start + EVAL_BATCH], padding=True, truncation=True, return_tensors="pt")
        output = translator.generate(**tokens.to(device), do_sample=True, temperature=temperature, top_k=0, num_beams=1,
                                     max_new_tokens=2 * tokens["input_ids"].shape[1] + 10)
        results += tokenizer.batch_decode(output, skip_special_tokens=True)
    return results


def demo_data() -> Data:
    """Made-up reviews of two dozen words: a verdict may be negated, and what other people said does not count."""
    rng = np.random.default_rng(0)
    verdicts = (("awful", "dull"), ("great", "fresh"))
    days, hours = ("monday", "friday", "saturday", "sunday"), ("morning", "evening")
    slots = (days, hours, ("plot", "cast", "music", "ending"), ("was", "felt"), (".", "!", "..."))

    def sentence(label: int) -> str:
        negated, quoted = rng.random(2) < (0.12, 0.15)
        verdict = rng.choice(verdicts[label ^ negated])
        day, hour, thing, verb, stop = map(rng.choice, slots)
        aside = f"{rng.choice(('critics', 'friends'))} said {rng.choice(verdicts[rng.integers(2)])} but "
        claim = f"on {day} {hour} the {thing} {verb} {'not ' if negated else ''}{verdict} {stop}"
        return aside + claim if quoted else claim

    rows = list(dict.fromkeys((sentence(i % 2), i % 2) for i in range(1200)))
    everything = Split([(text,) for text, _ in rows], np.array([label for _, label in rows]))
    test, validation, train = map(everything.take, np.split(np.arange(len(rows)), [300, 500]))
    return Data(train, validation, test, POLARITY)


class Encoded:
    """A Split as tokens, padded batch by batch."""

    def __init__(self, split: Split, tokenizer, max_length: int):
        tokens = tokenizer(*map(list, zip(*split.texts, strict=True)), truncation=True, max_length=max_length)
        self.tokens = [{name: tokens[name][row] for name in tokens} for row in range(len(split))]
        self.labels = torch.from_numpy(split.labels)  # (N,)
        self.pad = transformers.DataCollatorWithPadding(tokenizer)

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        tokens = self.pad([self.tokens[row] for row in rows])
        return {name: part.to(device) for name, part in tokens.items()}, self.labels[rows].to(device)


# ------------------------------------------------------------ model: tokens -> class logits and features


class Model(nn.Module):
    """An encoder and its classifier. What the classifier reads are the features, and SCL sees the same.

    Features are the last hidden layer at the first token (cls pooling) or its mean over real tokens. The classifier is
    a sequence classifier's own (cls) or a linear `head`, with `ce_temperature` T on the normalised features over T.
    """

    def __init__(self, backbone: transformers.PreTrainedModel, head: nn.Linear | None = None, pooling: str = "cls",
                 ce_temperature: float | None = None, classifier_is_new: bool = True):  # fmt: skip
        super().__init__()
        self.backbone, self.head, self.pooling, self.ce_temperature = backbone, head, pooling, ce_temperature
        self.classifier_is_new = classifier_is_new

    def forward(self, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.head is None:
            output = self.backbone(**tokens, output_hidden_states=True)
            return output.logits, output.hidden_states[-1][:, 0]  # (N, C), (N, D)
        hidden = self.backbone(**tokens).last_hidden_state  # (N, T, D)
        mask = tokens["attention_mask"][..., None]  # (N, T, 1)
        features = hidden[:, 0] if self.pooling == "cls" else (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        scaled = F.normalize(features, dim=1) / self.ce_temperature if self.ce_temperature else features
        return self.head(scaled), features

    def classifier_names(self) -> set[str]:
        """The parameters after the features, which SCL gives no gradient; BERT's pooler is one of them."""
        encoder = "backbone." if self.head else f"backbone.{self.backbone.base_model_prefix}."
        return {name for name, _ in self.named_parameters() if not name.startswith(encoder) or ".pooler." in name}


def fetch_model(model: str) -> str:
    """The local folder of a model. From the hub only safetensors come: nothing is ever unpickled."""
    if model == "demo" or os.path.isdir(model):
        return model
    connect_hub()
    files = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    with blame("--model", model, "a hub id or a folder"):
        return huggingface_hub.snapshot_download(model, allow_patterns=files)


def load_tokenizer(source: str, pooling: str):
    if source == "demo":  # RoBERTa's own kind, trained on the made-up sentences
        sentences = (text for (text,) in demo_data().train.texts)
        return transformers.RobertaTokenizer(model_max_length=64).train_new_from_iterator(
            sentences, vocab_size=400, show_progress=False)
    with blame("--model", source, "a folder that save_pretrained wrote"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # decoders have none; the mask hides it
        if tokenizer.model_max_length > 10**9:  # it does not say; and RoBERTa counts positions from 2
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            tokenizer.model_max_length = getattr(config, "max_position_embeddings", 514) - 2
        if pooling == "cls" and tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id:
            raise Mistake(f"{source} puts no cls token first (a decoder?), and another one has not seen the sentence; "
                          "choose an encoder or --pooling mean")
    return tokenizer


def load_model(source: str, pooling: str, label_names: tuple[str, ...], tokenizer, dropout: float,
               ce_temperature: float | None = None) -> Model:  # fmt: skip
    """A model of transformers, or a checkpoint of ours, with a classifier for these labels.

    What the source lacks, a classifier for this number of labels above all, comes from torch's random state.
    """
    labels: dict = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    own_classifier = pooling == "cls" and not ce_temperature
    auto = transformers.AutoModelForSequenceClassification if own_classifier else transformers.AutoModel
    with blame("--model", source, "a folder that save_pretrained wrote, with model.safetensors"):
        if source == "demo":
            config = transformers.RobertaConfig(
                vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=128, max_position_embeddings=66, type_vocab_size=1, initializer_range=0.05,
                pad_token_id=tokenizer.pad_token_id, **labels)
        else:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **labels)
        if config.is_encoder_decoder:
            raise Mistake(f"{source} is an encoder-decoder; choose an encoder")
        for name, value in config.to_dict().items():
            if ("dropout" in name or name.endswith("_pdrop")) and type(value) in (int, float):
                setattr(config, name, dropout)
        if hasattr(config, "classifier_pooling"):
            config.classifier_pooling = "cls"  # ModernBERT's own may be the mean, which is not what SCL would see
        if source == "demo":
            backbone, fresh = auto.from_config(config), set()
        else:
            backbone, info = auto.from_pretrained(
                source, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True, trust_remote_code=False)
            fresh = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        head = None if own_classifier else nn.Linear(config.hidden_size, len(label_names))
        model = Model(backbone, head, pooling, ce_temperature, classifier_is_new=source == "demo" or bool(fresh))
        encoder = {name for name, _ in model.named_parameters()} - model.classifier_names()
        if random := encoder & {f"backbone.{name}" for name in fresh}:
            raise Mistake(f"{source} lacks {len(random)} weights of its encoder, or has them in other shapes, such as "
                          f"{min(random).removeprefix('backbone.')}; save it anew by save_pretrained")
    if head:
        file = Path(source, "head.safetensors")
        trained = load_file(file) if file.is_file() else {}
        model.classifier_is_new = not trained or trained["weight"].shape != head.weight.shape
        if not model.classifier_is_new:
            head.load_state_dict(trained)
    return model


# ------------------------------------------------------------ training

RANK, WORLD_SIZE = 0, 1  # of one process; torchrun starts several
if dist.is_torchelastic_launched():
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TERMINATED: list[int] = []  # not empty: SIGTERM came, and the step is finished first


def batches(labels: np.ndarray, size: int, sampler: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of one batch after another, epoch after epoch; a short last batch is dropped unless it is the only one."""
    n, size = len(labels), min(size, len(labels))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            if sampler == "shuffled":
                yield order[start : start + size]
            else:  # two of each of as many classes as fit, the rest from anywhere
                chosen = [members[i] for i in rng.permutation(len(members))[: max(size // 2, 1)]]
                pairs = np.concatenate([rng.choice(rows, min(2, len(rows)), replace=False) for rows in chosen])
                others = rng.choice(n, min(2 * size, n), replace=False)
                yield np.concatenate([pairs, others[~np.isin(others, pairs)]])[:size]


@torch.inference_mode()
def predict(model: Model, data: Encoded, device: torch.device, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Class logits (N, C) and features (N, D) in the order of the rows; batches go by length, to pad little.

    The ranks share the batches out, and each ends with the rows of all.
    """
    model.eval()
    classes, width = model.backbone.config.num_labels, model.backbone.config.hidden_size
    order = np.argsort([len(tokens["input_ids"]) for tokens in data.tokens], kind="stable")
    outputs = torch.zeros(len(data.tokens), classes + width, device=device)
    for start in range(RANK * EVAL_BATCH, len(order), WORLD_SIZE * EVAL_BATCH):
        rows = order[start : start + EVAL_BATCH]
        with autocast(device, precision):
            outputs[rows] = torch.cat(model(**data.batch(rows, device)[0]), dim=1).float()
    if WORLD_SIZE > 1:
        dist.all_reduce(outputs)  # zeros but on one rank: exact
    results = outputs.cpu().numpy()
    return results[:, :classes], results[:, classes:]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def make_optimizer(model: Model, config: dict, classifier_only: bool) -> torch.optim.Optimizer:
    """AdamW with fairseq's settings for GLUE: no decay of biases and layer norms, the classifier at its own rate."""
    classifier, groups = model.classifier_names(), dict[tuple[float, float], dict]()
    for name, parameter in model.named_parameters():
        unused = model.head and ".pooler." in name  # BERT's, beside mean pooling
        parameter.requires_grad_(not unused and (name in classifier or not classifier_only))
        lr, decay = config["head_lr" if name in classifier else "lr"], config["weight_decay"] * (parameter.ndim > 1)
        groups.setdefault((lr, decay), {"lr": lr, "weight_decay": decay, "params": []})["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.98), eps=1e-6, fused=True)


class Training:
    """A model in training, and all that changes. Between two steps `save` writes it, and `load` goes on from there."""

    PLAIN = ("classifier_only", "step", "sums", "result")

    def __init__(self, model: Model, config: dict, device: torch.device, classifier_only: bool = False):
        self.model, self.config, self.device, self.classifier_only = model, config, device, classifier_only
        self.lam, self.tau = 0.0 if classifier_only else config["lam"], config["tau"]
        self.optimizer = make_optimizer(model, config, classifier_only)
        self.schedule = transformers.get_linear_schedule_with_warmup(
            self.optimizer, round(config["warmup_ratio"] * config["steps"]), config["steps"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=config["precision"] == "fp16")
        self.network: Any = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
        if config["compile"]:
            self.network = torch.compile(self.network, dynamic=True)
        self.best_weights: dict[str, Tensor] = {}
        self.result: dict = {"best_step": None, "validation_accuracy": None, "validation_accuracies": []}
        self.step = 0  # this one, or the last that was done
        self.sums = [0.0] * 4  # since the last validation: CE, SCL, its lowest and its collapsed value
        self.started = time.perf_counter()

    def forward(self, tokens: dict, piece: int) -> tuple[Tensor, Tensor]:
        """Class logits (B, C) and features (B, D); dropout is a pure function of seed, step, rank and piece.

        So the same masks can be had again, and no random state is kept.
        """
        key = np.random.SeedSequence((self.config["seed"], self.step, RANK, piece))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        with autocast(self.device, self.config["precision"]):
            return self.network(**tokens)

    def backward(self, pieces: list[dict], labels: Tensor) -> Tensor:
        """Gives the parameters the gradient of Eq. 1 on one batch; returns loss, CE, SCL, and the bounds of SCL.

        A batch larger than memory comes in pieces (--micro-batch-size). Accumulating their gradients would contrast
        each only within itself. So a first pass computes what all pieces give, without a graph; the loss of the whole
        batch yields the gradient of class logits and features; a second pass, under the same dropout, takes it on
        (gradient caching, Gao et al., 2021, arXiv 2101.06983).
        """
        with torch.set_grad_enabled(len(pieces) == 1):
            outputs = [self.forward(tokens, number) for number, tokens in enumerate(pieces)]
        own = [torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True)]  # (B, C), (B, D)
        class_logits, features, labels = gather_batch(*(part.float() for part in own), labels)  # of all ranks
        ce = F.cross_entropy(class_logits, labels)
        scl = scl_loss(features, labels, self.tau) if self.lam else torch.zeros_like(ce)
        loss = (1 - self.lam) * ce + self.lam * scl  # Eq. 1
        if len(pieces) == 1:
            self.scaler.scale(loss).backward()
        else:
            gradients = torch.autograd.grad(self.scaler.scale(loss), own, materialize_grads=True)
            sizes = [len(tokens["input_ids"]) for tokens in pieces]
            for number, cached in enumerate(zip(*(gradient.split(sizes) for gradient in gradients), strict=True)):
                # DistributedDataParallel averages over the ranks once, with the last piece.
                early = WORLD_SIZE > 1 and number + 1 < len(pieces)
                with self.network.no_sync() if early else contextlib.nullcontext():
                    again = self.forward(pieces[number], number)
                    sum((output * gradient).sum() for output, gradient in zip(again, cached, strict=True)).backward()
        return torch.stack([loss, ce, scl, *(scl_bounds(labels, self.tau) if self.lam else (ce, ce))]).detach()

    def validate(self, validation: "Encoded") -> str:
        """Notes the losses since the last validation, the accuracy, and the weights of the best; returns a line."""
        result, every = self.result, self.config["eval_every"]
        result["ce"], *scl_values = (total / (self.step % every or every) for total in self.sums)
        self.sums = [0.0] * 4
        text = f"step {self.step}/{self.config['steps']}  ce {result['ce']:.3f}"
        if self.lam:
            result["scl"], result["scl_lowest"], result["scl_collapsed"] = scl_values
            text += "  scl {:.3f} (lowest {:.3f}, collapsed {:.3f})".format(*scl_values)
            if not any(scl_values):
                text += ": no batch of three or more held two of a class"
        if self.lam < 1:
            class_logits, _ = predict(self.model, validation, self.device, self.config["precision"])
            if not np.isfinite(class_logits).all():  # the last update did it: the next loss would tell
                raise Diverged(self.step)
            accuracy = accuracy_score(validation.labels, class_logits.argmax(axis=1))
            text += f"  validation {accuracy:.3f}"
            result["validation_accuracies"].append([self.step, accuracy])
            if not self.best_weights or accuracy >= result["validation_accuracy"]:
                result |= {"best_step": self.step, "validation_accuracy": accuracy}
                self.best_weights = {name: w.cpu().clone() for name, w in self.model.state_dict().items()}
        return text

    def save(self, file: Path) -> None:
        """One safetensors file, which holds no code; it appears whole or not at all."""
        optimizer = self.optimizer.state_dict()  # its state: moments by the parameter's number
        groups = {"model": self.model.state_dict(), "best": self.best_weights, **optimizer["state"]}
        tensors = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
        facts = {name: getattr(self, name) for name in self.PLAIN} | {
            "param_groups": optimizer["param_groups"], "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(), "seconds": time.perf_counter() - self.started}
        with whole(file) as part:
            save_file(tensors, part, metadata={"facts": json.dumps(facts)})

    @classmethod
    def load(cls, file: Path, model: Model, config: dict, device: torch.device) -> "Training":
        groups: dict[str, dict[str, Tensor]] = {"best": {}}
        try:
            with safe_open(file, "pt") as stored:
                facts = json.loads(stored.metadata()["facts"])
                for key in stored.keys():  # noqa: SIM118  # no dict
                    group, name = key.split("/", 1)
                    groups.setdefault(group, {})[name] = stored.get_tensor(key)
            self = cls(model, config, device, facts["classifier_only"])
            model.load_state_dict(groups.pop("model"))
            self.best_weights = groups.pop("best")
            moments = {int(number): members for number, members in groups.items()}
            self.optimizer.load_state_dict({"state": moments, "param_groups": facts["param_groups"]})
            self.schedule.load_state_dict(facts["schedule"])
            self.scaler.load_state_dict(facts["scaler"])
        except torch.OutOfMemoryError:
            raise  # which is not the file's fault
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise Mistake(f"{file} cannot be resumed ({reason}); delete it to begin the run anew") from None
        vars(self).update({name: facts[name] for name in self.PLAIN}, started=self.started - facts["seconds"])
        return self


def fit(training: Training, train: Encoded, validation: Encoded, state: Path | None = None,
        save_every: int | None = None) -> None:  # fmt: skip
    """Trains, and leaves in the model the weights of the best validation accuracy (the later, if equal).

    With lam = 1 nothing trains the classifier, so validation cannot choose, and the last step stays. Then a second
    training follows, with `classifier_only`: cross-entropy on frozen features, without dropout.
    """
    config, device, already = training.config, training.device, training.step
    steps, rng = config["steps"], np.random.default_rng(config["seed"])
    order = batches(train.labels.numpy(), config["batch_size"], config["sampler"], rng)
    order = itertools.islice(order, already, None)

    unread: list[Tensor] = []  # what `backward` returned, a step each
    hidden = True if RANK else None  # None: where there is no terminal
    bar = tqdm(range(already + 1, steps + 1), config["run"], steps, initial=already, disable=hidden, leave=False)
    for step in bar:
        training.step = step
        training.model.train(not training.classifier_only)
        rows = np.split(next(order), WORLD_SIZE)[RANK]  # this process's share of the batch
        size = config["micro_batch_size"] or len(rows)
        parts = [train.batch(rows[start : start + size], device) for start in range(0, len(rows), size)]
        pieces, labels = [tokens for tokens, _ in parts], torch.cat([labels for _, labels in parts])  # (B, T), (B,)
        unread.append(training.backward(pieces, labels))
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.schedule.step()
        training.optimizer.zero_grad()

        validate = step % config["eval_every"] == 0 or step == steps
        save, read = bool(save_every and step % save_every == 0), validate or step % 20 == 0
        terminated = anywhere(bool(TERMINATED), device)
        if read or save or terminated:  # not at every step, since reading waits for the device
            values = torch.stack(unread).tolist()
            failed = [at for at, row in enumerate(values, step + 1 - len(values)) if not math.isfinite(row[0])]
            if failed:
                raise Diverged(failed[0])
            for row in values:
                training.sums = [total + value for total, value in zip(training.sums, row[1:], strict=True)]
            unread.clear()
            bar.set_postfix(loss=f"{values[-1][0]:.3f}", validation=training.result["validation_accuracy"])
        if validate:
            bar.write(training.validate(validation))
        if state and (save or terminated) and not RANK:
            training.save(state)
        if terminated:
            anywhere(True, device)  # waits until it is written: torchrun ends all soon after the first
            bar.write(f"terminated after step {step}, which {state} has; the same command goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
    if training.best_weights:
        training.model.load_state_dict(training.best_weights)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is set on any rank, so that all do the same."""
    if WORLD_SIZE == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)


# ------------------------------------------------------------ one run, and a sweep of runs


def run(config: dict, model: Model, tokenizer, data: list[Encoded], device: torch.device, save: Path | None,
        state: Path, save_every: int | None) -> dict:  # fmt: skip
    """Train, test, save: the record. What is random comes from config["seed"], so a sweep changes nothing."""
    train, validation, test = data
    if anywhere(state.is_file(), device):
        training = Training.load(state, model, config, device)
        print(f"going on from step {training.step}, which {state} has")
    else:
        training = Training(model, config, device)
    try:
        fit(training, train, validation, state, save_every)
        if config["lam"] == 1 and not training.classifier_only:
            print("lam 1 left the classifier untrained: now fitting it alone, on the frozen features")
            started, result = training.started, training.result
            training = Training(model, config, device, classifier_only=True)
            training.started, training.result = started, result
            fit(training, train, validation, state, save_every)
    except Diverged as diverged:
        kept, best_step = "", training.result["best_step"]
        if save and best_step and not RANK:
            model.load_state_dict(training.best_weights)
            save_checkpoint(save, model, tokenizer, config | training.result)
            kept = f"; {save} keeps step {best_step}, the best before"
        anywhere(True, device)  # waits until it is written
        failure = f"loss or class logits are not finite at step {diverged}"
        raise Mistake(f"{config['run']}: {failure}{kept}; try a smaller --lr") from None
    record = config | training.result

    class_logits, _ = predict(model, test, device, config["precision"])
    labels, predicted = test.labels.numpy(), class_logits.argmax(axis=1)
    record |= {
        "test_accuracy": accuracy_score(labels, predicted),
        "test_macro_f1": f1_score(labels, predicted, average="macro"),
        "test_mcc": matthews_corrcoef(labels, predicted),
        "test_correct": np.packbits(labels == predicted).tobytes().hex(),  # a bit an example, in the test set's order
        "seconds": round(time.perf_counter() - training.started, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": COMMIT,
    }
    if save and not RANK:
        save_checkpoint(save, model, tokenizer, record)
    return record


def git_commit() -> str | None:
    with contextlib.suppress(OSError):
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    return None


COMMIT = git_commit()  # of the code as it was loaded: a long sweep may see another one


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`, whole or not at all, on the disk itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = path.with_name(f".{path.name}.part")  # a folder, since libraries write temporary files beside theirs
    part, folder = parts / path.name, os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # two processes may write the same
    try:
        remove(parts)  # of one who was killed here
        parts.mkdir()
        yield part
        for file in (part, *part.glob("*")):
            sync(file)
        if path.is_dir():
            remove(path)
        part.replace(path)
        os.fsync(folder)
    finally:
        remove(parts)
        os.close(folder)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """A file or a folder is on the disk itself afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


MODEL_CARD = """# {run}

{model}, fine-tuned on {task} by {method}: {train_size} training examples, seed {seed}, {pooling} pooling. Best
validation accuracy {validation}, at step {best_step} of {steps}; test accuracy {test}, on {test_size} examples.
`record.json` has all settings. {loading}
SCL, the supervised contrastive loss: Gunel, Du, Conneau, Stoyanov, ICLR 2021, https://arxiv.org/abs/2011.01403
"""
LOADING = {
    True: '`transformers.pipeline("text-classification", model=FOLDER)` loads it.',
    False: "The linear classifier is in `head.safetensors`: a `pipeline` would not find it, and answer at random.",
}  # whether the classifier is the model's own


def save_checkpoint(folder: Path, model: Model, tokenizer, record: dict) -> None:
    """A folder that transformers loads, its record and a model card beside the weights."""
    accuracy = {split: "none" if (value := record.get(f"{split}_accuracy")) is None else f"{value:.3f}"
                for split in ("validation", "test")}
    facts = record | accuracy | {"method": method_name(record), "loading": LOADING[model.head is None]}
    with whole(folder) as part:
        model.backbone.save_pretrained(part)
        if model.head:
            save_file(model.head.state_dict(), part / "head.safetensors")
        tokenizer.save_pretrained(part)
        (part / "record.json").write_text(json.dumps(record) + "\n")
        (part / "README.md").write_text(MODEL_CARD.format(**facts), encoding="utf-8")


def method_name(record: dict) -> str:
    if record["lam"] == 1:
        return f"SCL ({record['tau']:g}), then CE"
    if record["ce_temperature"]:
        return f"CE on normalised features ({record['ce_temperature']:g})"
    return f"CE + SCL ({record['lam']:g}, {record['tau']:g})" if record["lam"] else "CE"


def read_records(file: Path) -> list[dict]:
    """A record a line. A torn line, such as a kill or a full disk leaves, is said and left out."""
    records, text = [], file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for row, line in enumerate(text.splitlines(), start=1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"{file}, line {row} is no record: left out", file=sys.stderr)
    return records


def append_record(file: Path, record: dict) -> None:
    """Whole or not at all, and unless another process was faster; a torn line before it is ended first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab", buffering=0) as results:
        fcntl.flock(results, fcntl.LOCK_EX)
        if record["run"] in {other.get("run") for other in read_records(file)}:
            return
        size, torn = file.stat().st_size, file.read_bytes()[-1:] not in (b"", b"\n")
        line = (b"\n" if torn else b"") + json.dumps(record).encode() + b"\n"
        try:
            if results.write(line) < len(line):
                raise OSError(f"{file}: no space left for a record")
            os.fsync(results.fileno())
        except OSError:
            results.truncate(size)
            raise


def configure(args: argparse.Namespace, lam: float, tau: float | None, seed: int, splits: tuple[Split, ...]) -> dict:
    """All that determines a run, every default resolved; the digest of it is in the run's name."""
    per_epoch = max(1, len(splits[0]) // args.batch_size)
    by_epochs = math.ceil(args.epochs * per_epoch) if args.epochs else max(10 * per_epoch, 200)
    steps, lr = args.max_steps or by_epochs, args.lr or (1e-3 if args.model == "demo" else 1e-5)
    config = {name: value for name, value in vars(args).items() if name not in ("epochs", "max_steps", *MACHINE_FLAGS)}
    config |= {"lam": lam, "tau": tau, "seed": seed, "lr": lr, "head_lr": args.head_lr or (1e-3 if lam == 1 else lr)}
    config |= {"steps": steps, "eval_every": args.eval_every or math.ceil(steps / 10), "processes": WORLD_SIZE}
    for name, split in zip(("train", "validation", "test"), splits, strict=True):
        config |= {f"{name}_size": len(split), f"{name}_checksum": split.checksum}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:6]
    method = f"lam{lam:g}-tau{tau:g}" if lam else "lam0"
    name = f"{Path(args.task).resolve().name}-n{len(splits[0])}-{method}-seed{seed}-{digest}"
    return {"run": name} | config | {"data_dir": args.data_dir}


def sweep(args: argparse.Namespace) -> None:
    """Loads and tokenises once, then runs what has no record yet: lam x tau for one seed after another."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.model == "demo":
        torch.set_num_threads(1)  # so small that more threads only wait for each other
    device = pick_device(args.device)
    data = load_data(args.task, args.data_dir, few_shot=bool(args.shots or args.shots_per_class))
    source = fetch_model(args.model)
    tokenizer = load_tokenizer(source, args.pooling)
    args.max_length = min(args.max_length, tokenizer.model_max_length)
    encode = functools.cache(lambda split: Encoded(split, tokenizer, args.max_length))
    results = Path(args.out, "results.jsonl")
    done = {record.get("run"): record for record in read_records(results)}
    seeds = dict.fromkeys(args.seed)
    settings = dict.fromkeys((lam, tau if lam else None) for lam in args.lam for tau in args.tau)
    keep = args.save or len(settings) * len(seeds) == 1
    for seed in seeds:
        train, validation, test = sample(data, args.shots, args.shots_per_class, seed)
        if not len(validation):
            raise Mistake(f"argument --task: {args.task} leaves no row for validation; add a file with other rows than "
                          "test's, or fewer --shots")
        if args.noise == "backtranslation":
            train = back_translate(train, args.noise_level, args.translators, Path(args.out), seed, device)
        elif args.noise:
            train = add_noise(train, args.noise, args.noise_level, len(data.label_names), seed)
        if (size := min(args.batch_size, len(train))) % WORLD_SIZE:
            raise Mistake(f"argument --batch-size: expected a multiple of {WORLD_SIZE}, one share a process, got {size}"
                          + (f", all there are of {args.batch_size}" if size < args.batch_size else ""))
        for lam, tau in settings:
            config = configure(args, lam, tau, seed, (train, validation, test))
            folder = Path(args.out, config["run"])
            state = Path(args.out, f"{config['run']}.state.safetensors")
            if anywhere(config["run"] in done, device):
                kept = f"in {folder}" if folder.exists() else "not kept"
                print(json.dumps(done.get(config["run"])))
                print(f"{config['run']} is done: its record above, its checkpoint {kept}; to run it anew, delete that "
                      f"line of {results} or choose another --out")
                if not RANK:
                    state.unlink(missing_ok=True)  # of one who was killed between the two
                continue
            torch.manual_seed(seed)
            model = load_model(source, args.pooling, data.label_names, tokenizer, args.dropout,
                               args.ce_temperature).to(device)
            describe(config, model, train, data.label_names)
            parts = [encode(split) for split in (train, validation, test)]
            record = run(config, model, tokenizer, parts, device, folder if keep else None, state, args.save_every)
            if not RANK:
                append_record(results, record)
                state.unlink(missing_ok=True)
            print("test accuracy {test_accuracy:.3f}, validation {validation_accuracy:.3f} at step {best_step}, "
                  "{seconds:.0f} s".format(**record))
            print(f"record in {results}, checkpoint {f'in {folder}' if keep else 'not kept, for want of --save'}")


def describe(config: dict, model: Model, train: Split, names: tuple[str, ...]) -> None:
    sizes = np.bincount(train.labels, minlength=len(names))
    counts = ", ".join(f"{count} {name}" for name, count in zip(names[:9], sizes, strict=False))
    parameters, device = sum(p.numel() for p in model.parameters()), next(model.parameters()).device
    classifier = "a new classifier" if model.classifier_is_new else "its classifier"
    noise = f" with {config['noise']} noise {config['noise_level']:g}" if config["noise"] else ""
    print(f"\n{config['run']}\n{config['model']} with {classifier}, {parameters / 1e6:.1f} M parameters, on {device}; "
          f"{config['pooling']} pooling, lr {config['lr']:g}, {config['steps']} steps of "
          f"{min(config['batch_size'], len(train))}; {len(train)} train{noise} ({counts}), "
          f"{config['validation_size']} validation, {config['test_size']} test")
    for text, label in zip(train.texts[:3], train.labels, strict=False):
        print(f"  {names[label]}: {' | '.join(text)[:100]}")
    if not sizes.all():
        print(f"  warning: no training example of {names[sizes.argmin()]}: a label mistyped, or its only one validates")
    if config["validation_size"] < 50:
        print(f"  warning: only {config['validation_size']} validation examples, which choose the checkpoint")
    if config["model"] == "demo":
        print("  a smoke run, not a result: this tiny encoder starts from random weights")


def pick_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and dist.is_torchelastic_launched() else name
    with blame("--device", name, "cpu, or a device that torch sees"):
        device = torch.empty(1, device=name).device
        autocast(device, "fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the first tells what all do
    return device


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        sweep(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except Mistake as mistake:
        message = str(mistake)
    except (OSError, SafetensorError) as error:  # a full disk is one or the other
        message = f"{error}; {args.out} has what was finished, the same command goes on"
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message = "out of memory; a smaller --micro-batch-size gives the same gradient"
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on with the runs that {args.out} lacks, in this one from where "
              "--save-every saved it last, else from its start", file=sys.stderr)
        return 130
    print(f"finetune.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: TERMINATED.append(number))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log grows line by line, piped too
    sys.exit(main())
