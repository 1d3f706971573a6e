"""Loads tasks from files in GLUE's layout, from your own folders, or from data sets on the Hugging Face hub.

    data = load_data("sst2", "glue", few_shot=True)

A row of a file becomes tokens in four steps:
1. `read_table` (files.py) reads the columns.
2. `to_split` makes examples.
3. `sample` (data.py) draws the training set.
4. `Model.tokenize` (model.py) makes the tokens of a batch.
"""

import contextlib
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.data import Data, Split, demo_data, separate
from parts.errors import UserError, connect_hub, explain_errors, one_line
from parts.files import FORMATS, Table, decode, read_table


class Task(NamedTuple):
    """Describes a classification task: the data set on the hub and the local files in GLUE's layout."""

    folder: str
    config: str | None  # name of the config on the hub
    hub_text: tuple[str, ...]  # text columns on the hub
    labels: tuple[str, ...]  # class names in the order of the class numbers
    text: tuple[str, ...] = ()  # text columns of local files, if different from hub_text
    label: str = "label"
    test: str = "dev"  # name of the local test file: GLUE's validation set, because GLUE's test set has no labels
    header: tuple[str, ...] | None = None  # column names, if the local files have no header line
    hub: str = "nyu-mll/glue"


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
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
UNREADABLE = (".json", ".ndjson", ".jsonlines", ".gz")  # endings of data files in formats that are not read


def load_data(task: str, data_dir: str | None, few_shot: bool) -> Data:
    """Loads a task. Removes examples so that no text is in two splits.

    With few shots, GLUE's official validation set is split at random, with a fixed seed. One half is our test set. At
    most 500 examples of the other half are our validation set. With the whole training set, the official validation set
    is our test set. For Amazon and Yelp, our test set has 10,000 examples of the official test set.
    """
    flag, spec = "--data-dir" if data_dir else "--task", TASKS.get(task)
    files = find_files(task, data_dir)
    if task == "demo":
        return demo_data()
    with explain_errors(flag, spec.hub if spec else task, "a data set of the hub or files in GLUE's layout",
                        without_hub="give --data-dir with the files in GLUE's layout"):
        if spec is None:
            splits, label_names = read_folder(Path(task), files)
        else:
            splits = {name: read_glue(file, spec) for name, file in files.items()} or load_hub(spec)
            label_names = spec.labels
        train, validation, test = splits["train"], splits.get("validation"), splits["test"]
        if spec and spec.test == "test":
            test = test.draw(10_000)
        elif spec and few_shot:
            official, test = test, test.draw(len(test) // 2)
            validation = official.without(test).draw(500)
        return Data(*separate(train, validation, test, few_shot), label_names)


# ------------------------------------------------------------ find the files


def find_files(task: str, data_dir: str | None) -> dict[str, Path]:
    """Returns a dictionary that maps each split to a local file.

    The dictionary is empty for the demo and for a task from the hub.
    """
    if task.lower().replace("-", "") == "stsb":
        raise UserError(f"argument --task: {task} is regression, and SCL needs classes; mrpc and qqp are similar tasks")
    if data_dir and task not in TASKS:
        raise UserError(f"argument --data-dir: needs a task of {', '.join(TASKS)}, got --task {task}")
    if data_dir:
        folder = Path(data_dir, TASKS[task].folder)
        files = {"train": folder / "train.tsv", "test": folder / f"{TASKS[task].test}.tsv"}
        for file in files.values():
            if not file.is_file():
                raise UserError(f"argument --data-dir: no file {file}; expected GLUE's layout, DIR/SST-2/train.tsv")
        return files
    if task == "demo" or task in TASKS:
        return {}
    if not Path(task).is_dir():
        raise UserError(f"argument --task: {task} is neither a folder nor one of demo, {', '.join(TASKS)}")
    files = {split: find_split(Path(task), split) for split in SPLIT_NAMES}
    return {split: file for split, file in files.items() if file}


def find_split(folder: Path, split: str) -> Path | None:
    """Returns the file of a split, such as train.csv, in the user's folder. Returns None without a validation file."""
    named = sorted(path for path in folder.iterdir() if path.name.split(".")[0].lower() in SPLIT_NAMES[split])
    found = [path for path in named if path.suffix.lower() in FORMATS and path.is_file()]
    if len(found) > 1:
        raise UserError(f"argument --task: {found[0]} and {found[1].name} are both {split} files; keep one")
    if not found and (named or split != "validation"):
        others = one_line(", ".join(path.name for path in named or sorted(folder.iterdir())), 100) or "nothing"
        formats = ", ".join(f"{split}{suffix}" for suffix in FORMATS)
        expected = f"expected {formats} with the columns text and label (jsonl: one JSON object per line)"
        hint = other_layout(folder) or expected
        raise UserError(f"argument --task: {folder} has no {split} file (found: {others}); {hint}")
    return found[0] if found else None


def other_layout(folder: Path) -> str | None:
    """Returns a hint for the user if `save_to_disk` wrote the folder or if the folder has GLUE's layout."""
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return "save_to_disk wrote this folder; write each split with to_parquet, for example to train.parquet"
    for name, task in TASKS.items():
        if (folder / task.folder).is_dir():
            return f"for a folder in GLUE's layout give --task {name} --data-dir {folder}"
        if folder.resolve().name == task.folder:
            return f"for a folder of GLUE give --task {name} --data-dir {folder.parent}"
    return None


# ------------------------------------------------------------ read examples


def read_glue(file: Path, task: Task) -> Split:
    """Reads a file of GLUE.

    Skips incomplete lines, to get the same examples as in the copy of GLUE on the hub. Prints the number of skipped
    lines.
    """
    names = (*(task.text or task.hub_text), task.label)
    table = read_table(file, names, task.header)
    *texts, labels = (table.columns[name] for name in names)
    rows = zip(table.numbers, zip(*texts, strict=True), map(str.strip, labels), strict=True)
    rows = [(number, texts, label) for number, texts, label in rows if label]
    if skipped := len(labels) + len(table.bad_rows) - len(rows):
        lines = skipped + len(rows)
        print(f"note: {skipped} of {lines} lines in {file} are incomplete and were skipped", file=sys.stderr)
    classes = {str(number): number for number in range(len(task.labels))}  # GLUE writes class numbers or names
    return to_split(file, rows, classes | {name: number for number, name in enumerate(task.labels)})


def read_folder(folder: Path, files: dict[str, Path]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Reads all splits in a folder of the user. The classes of the task are the labels in the training file."""
    data_files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (*FORMATS, *UNREADABLE)]
    if unread := [path.name for path in data_files if path not in files.values()]:
        print(f"note: these files in {folder} are not used: {one_line(', '.join(unread), 100)}", file=sys.stderr)
    rows, has_pair = {}, {}
    for split, file in files.items():
        table = read_own(file, ("text", "label"), other_layout(folder))
        labels = [unicodedata.normalize("NFC", label.strip()) for label in table.columns.pop("label")]
        rows[split] = list(zip(table.numbers, zip(*table.columns.values(), strict=True), labels, strict=True))
        has_pair["text_pair" in table.columns] = file
    if len(has_pair) > 1:
        raise UserError(f"{has_pair[True]} has a column text_pair, but {has_pair[False]} has none; expected it in both")
    names = sorted({label for _, _, label in rows["train"]})
    with contextlib.suppress(ValueError):  # raised if a class name is not a whole number
        names.sort(key=int)
    if len(names) == 1:
        raise UserError(f"{files['train']} has only the label {one_line(names[0], 60)}; expected two or more classes")
    classes = {name: number for number, name in enumerate(names)}
    return {split: to_split(file, rows[split], classes) for split, file in files.items()}, tuple(names)


def read_own(file: Path, needed: tuple[str, ...], hint: str | None = None) -> Table:
    """Reads a file of the user and rejects missing values. Prints the names of columns that are not read."""
    table = read_table(file, needed, hint=hint)
    if unread := [name or "(no name)" for name in table.names if name not in table.columns]:
        names = one_line(", ".join(unread), 100)
        print(f"note: these columns of {file} are not used: {names}. A second text must have the column name text_pair",
              file=sys.stderr)
    for row in table.bad_rows:
        advice = "quote texts with commas" if file.suffix.lower() == ".csv" else "remove tabs from texts"
        raise UserError(f"{file}, row {row.number}: the number of fields is {row.actual_columns}, but the header has "
                        f"{row.expected_columns} columns; {advice}, or correct the header")
    for number, row in zip(table.numbers, zip(*table.columns.values(), strict=True), strict=True):
        for name, value in zip(table.columns, row, strict=True):
            if not value or not value.strip():
                raise UserError(f"{file}, row {number} has no {name}")
        if row == tuple(table.columns):
            raise UserError(f"{file}, row {number} is the header again; delete the row")
    return table


def to_split(file: Path, rows: list[tuple[int, tuple[str, ...], str]], classes: dict[str, int]) -> Split:
    """Makes a Split from rows of a file, with class numbers instead of class names."""
    if not rows:
        raise UserError(f"{file} has no rows")
    for number, _, label in rows:
        if label not in classes:
            names = one_line(", ".join(classes), 100)
            raise UserError(f"{file}, row {number}: the label {one_line(label, 60)} is not one of the classes {names}")
    return Split([texts for _, texts, _ in rows], np.array([classes[label] for _, _, label in rows]))


def read_texts(file: str | Path) -> list[tuple[str, ...]]:
    """Reads texts without labels, from a table or from a file with one text (or two, separated by a tab) per line."""
    file = Path(file)
    if file.suffix.lower() in FORMATS:
        rows = list(zip(*read_own(file, ("text",)).columns.values(), strict=True))
    elif file.suffix.lower() in UNREADABLE:
        raise UserError(f"{file} has a format that is not read; expected {', '.join(FORMATS)}, or one text per line")
    else:
        lines = re.sub("\r\n|\r", "\n", decode(file)).removesuffix("\n").split("\n")
        if re.match(r'text$|text[,\t]|\{"', lines[0]):
            print(f"note: {file} begins like a table, but is read as one text per line; a table needs a file with the "
                  f"ending {', '.join(FORMATS)}", file=sys.stderr)
        rows = [tuple(line.split("\t")) for line in lines if line.strip()]
        if blank := len(lines) - len(rows):
            print(f"note: {blank} blank line(s) in {file} were skipped", file=sys.stderr)
    if not rows:
        raise UserError(f"{file} has no texts; expected one per line")
    for row in rows:
        if len(row) > 2 or len(row) != len(rows[0]):
            line = one_line(" ".join(row), 60)
            raise UserError(f"{file}: the line {line} has {len(row) - 1} tab(s); expected none, or one in each line "
                            "between the two texts of a pair")
        if not all(text.strip() for text in row):
            raise UserError(f"{file}: the line {one_line(' | '.join(row), 60)} lacks one text of its pair")
    return rows


# ------------------------------------------------------------ the hub


def load_hub(task: Task) -> dict[str, Split]:
    connect_hub()
    import datasets  # imported late, because datasets reads the offline setting during its import

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    splits = {}
    for split, name in (("train", "train"), ("test", task.test.replace("dev", "validation"))):
        part = datasets.load_dataset(task.hub, task.config, split=name)
        texts = zip(*(part[column][:] for column in task.hub_text), strict=True)
        splits[split] = Split(list(texts), np.array(part["label"][:]))
    return splits
