"""Groups records into settings and table rows, and finds the rows of CE and CE + SCL that may be compared.

A setting is a task together with all hyperparameters that CE and CE + SCL must share in a comparison, such as shots,
encoder and batch size. A table row stands for one method in one setting, with one choice of learning rates and number
of steps. The records of a table row are runs that differ only in the seed.
"""

import itertools
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from parts.errors import UserError, explain_errors, one_line
from parts.records import ARM_AND_SEED, base_model, method_name, read_records

# All fields of a record belong to the setting, except those in NOT_SETTING. A new flag belongs to the setting.
RESULTS = ("run", "arm", "ce", "scl", "scl_lowest", "scl_collapsed", "best_step", "validation_accuracy",
           "validation_accuracies", "test_accuracy", "test_macro_f1", "test_mcc", "test_correct", "seconds")
LOSS = ("lam", "tau", "ce_temperature")
TRAINING = ("lr", "head_lr", "steps", "eval_every")
ROW = (*LOSS, *TRAINING)
MACHINE = ("device", "cpu_capability", "python", "torch", "transformers", "commit", "data_dir", "processes")
FROM_SEED_OR_DATA = ("seed", "train_checksum", "validation_checksum", "train_size", "validation_size", "num_texts",
                     "label_checksum", "model")  # `base_model` is part of the setting, `model` is not
NOT_SETTING = {*RESULTS, *ROW, *MACHINE, *FROM_SEED_OR_DATA}
NOISE = ("noise", "noise_level", "translators")
CE, CE_SCL = (0, None, None), (0.9, 0.3, None)  # values of LOSS

TEXTS = ("task", "model", "pooling", "precision", "train_checksum", "validation_checksum", "test_checksum")
LIMITS = {"lam": (0, 1), "lr": (0, 1e9), "head_lr": (0, 1e9), "steps": (1, 1e9), "eval_every": (1, 1e9),
          "seed": (0, 1e15), "max_length": (1, 1e9), "test_size": (1, 1e9)}  # lowest and highest valid value
RESULT_LIMITS = {"validation_accuracy": (0, 1), "test_accuracy": (0, 1), "seconds": (0, 1e9)}

Row = dict[int, dict]  # maps a seed to the record of the run with this seed
Settings = dict[tuple, dict[tuple, Row]]  # maps a setting to its table rows; their keys are the values of ROW

# Test accuracies in the paper (Tables 2, 3 and 5): first CE, then CE + SCL with the best of 24 pairs of lam and tau.
# The keys of PAPER are task, shots and the temperature of back-translation. The last line has the transfer from SST-2.
PAPER = {
    ("sst2", "20", None): (85.9, 88.1), ("qnli", "20", None): (65.0, 75.7), ("mnli", "20", None): (39.3, 42.7),
    ("sst2", "100", None): (91.1, 92.8), ("qnli", "100", None): (81.9, 82.5), ("mnli", "100", None): (59.2, 61.1),
    ("sst2", "1000", None): (94.0, 94.1), ("qnli", "1000", None): (89.2, 89.8), ("mnli", "1000", None): (81.4, 81.5),
    ("sst2", "100", 0.3): (92.0, 92.6), ("qnli", "100", 0.3): (81.1, 82.7), ("mnli", "100", 0.3): (54.0, 61.2),
    ("sst2", "100", 0.5): (91.4, 91.5), ("qnli", "100", 0.5): (80.0, 81.9), ("mnli", "100", 0.5): (55.3, 62.1),
    ("sst2", "100", 0.7): (91.7, 91.2), ("qnli", "100", 0.7): (78.9, 81.3), ("mnli", "100", 0.7): (54.6, 62.3),
    ("sst2", "100", 0.9): (90.0, 91.5), ("qnli", "100", 0.9): (75.9, 80.1), ("mnli", "100", 0.9): (47.0, 53.0),
    ("sst2", "all", None): (96.0, 96.3), ("qnli", "all", None): (90.4, 93.9), ("mnli", "all", None): (88.4, 88.6),
    ("cola", "all", None): (86.0, 86.1), ("mrpc", "all", None): (86.4, 89.5), ("rte", "all", None): (85.5, 85.7),
    ("amazon_polarity", "20 a class", None): (87.4, 90.3), ("yelp_polarity", "20 a class", None): (90.8, 91.2),
}


def read_settings(files: list[str]) -> Settings:
    """Reads the records of all files. A run in two files counts once. Rejects records that have a `conflict`."""
    settings: Settings = {}
    for file in files:
        file = os.path.join(file, "results.jsonl") if os.path.isdir(file) else file
        if not os.path.isfile(file):
            raise UserError(f"argument RESULTS.jsonl: no file {file}; finetune.py writes OUT/results.jsonl")
        for record in read_records(Path(file)):
            source = f"run {record['run'][:100]} in {file}"
            with explain_errors("RESULTS.jsonl", source, "a record that finetune.py wrote"):
                record = add_fields(record, LIMITS | RESULT_LIMITS) | {"file": file}
            row = settings.setdefault(record["setting"], {}).setdefault(record["row"], {})
            if problem := conflict(row, record):
                raise UserError(f"argument RESULTS.jsonl: {problem}; keep one")
            row.setdefault(record["seed"], record)
    if not settings:
        raise UserError(f"argument RESULTS.jsonl: no record in {', '.join(files)}")
    add_names([record for rows in settings.values() for row in rows.values() for record in row.values()])
    return settings


def read_run(folder: str) -> dict:
    """Returns the record of the run that wrote a checkpoint folder."""
    file = Path(folder, "record.json")
    if not os.path.isfile(file):
        raise UserError(f"argument RUN: {folder} is no checkpoint of finetune.py (no record.json); a sweep keeps "
                        "checkpoints with --save")
    with explain_errors("RUN", file, "the record that finetune.py wrote"):
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        return add_fields(record | {"run": one_line(record["run"])}, LIMITS) | {"file": folder}


def conflict(row: Row, record: dict) -> str | None:
    """Returns the reason why a record and the records of `row` cannot share a table row, or None without a reason."""
    if not row:
        return None
    data = ["train_size"]
    if record["size"] == "all" and not record["noise"]:  # then all seeds have the same training examples
        data += ["train_checksum", "validation_checksum"]
    for problem, other, names in (
        ("different training data in", first(row), data),
        ("different source checkpoints in", first(row), ["source"]),
        (f"seed {record['seed']} twice,", row.get(record["seed"], record), ["run", "test_accuracy"]),
    ):
        if any(other.get(name) != record.get(name) for name in names):
            return (f"{describe(record)} has {problem} {other['run']} (in {other['file']}) and {record['run']} "
                    f"(in {record['file']})")
    return None


def add_fields(record: dict, limits: dict[str, tuple]) -> dict:
    """Checks a record, and adds derived fields such as setting, row, method, size and the gain of the paper."""
    check(record, limits)
    arm = ARM_AND_SEED.match(record["run"])  # old records lack the fields arm and base_model
    record = {"arm": arm[1] if arm else record["run"], "base_model": base_model(record["model"])} | record
    record = dict.fromkeys(("shots", "shots_per_class", "tau", "ce_temperature", "data_dir", *NOISE)) | record
    named = {name: json.dumps(value) for name, value in record.items()
             if name not in NOT_SETTING and value is not None and value is not False}
    per_class = record["shots_per_class"]
    record["size"] = f"{per_class} a class" if per_class else str(record["shots"] or "all")
    record["setting"] = tuple(sorted(named.items()))
    record["row"] = tuple(map(record.get, ROW))
    hash(record["row"])  # raises TypeError if a value is a list
    record["loss"] = tuple(map(record.get, LOSS))
    source = ARM_AND_SEED.match(record["model"].rstrip("/"))
    record["source"] = source[1] if source else None  # in a transfer experiment: the source run without its seed
    record["method"] = method_name(record)
    record["papers_gain"] = papers_gain(record)
    record["noise_text"] = f"{record['noise']} noise {record['noise_level']:g}" if record["noise"] else ""
    if "test_correct" in record:  # one bit per test example, in hexadecimal
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["test_correct"]), np.uint8))
        record["correct"] = bits[: record["test_size"]].reshape(record["test_size"]).astype(int)
    add_names([record])
    return record


def check(record: dict, limits: dict[str, tuple]) -> None:
    """Raises ValueError if the record lacks a needed field or if a field has an impossible value."""
    for name in (*TEXTS, *limits):
        value, (low, high) = record.get(name), limits.get(name, (0, 0))
        is_number = isinstance(value, int | float) and low <= value <= high
        if not (isinstance(value, str) if name in TEXTS else is_number):
            raise ValueError(f"{name} is {value!r}" if name in record else f"it has no {name}")
    if (record["lam"] == 0) != (record.get("tau") is None):
        raise ValueError(f"lam is {record['lam']} and tau is {record.get('tau')}; tau must be null for lam 0 and a "
                         "number otherwise")


def add_names(records: list[dict]) -> None:
    """Adds short names of the task and the model to each record: the last part of the path.

    If several paths have the same last part, the whole path is the name.
    """
    for field, name in (("task", "task_name"), ("base_model", "model_name")):
        ends = Counter(Path(path).name for path in {record[field] for record in records})
        for record in records:
            end = Path(record[field]).name
            record[name] = end if end and ends[end] == 1 else record[field]


def shown(record: dict) -> dict:
    """Returns the record for a table: with names instead of paths, and None instead of default values."""
    usual = {"head_lr": record["lr"], "eval_every": math.ceil(record["steps"] / 10)}
    derived = {name: None for name, value in usual.items() if record[name] == value}
    folders = {"model": record["model_name"], "task": record["task_name"]}
    lists = {name: " ".join(map(str, value)) for name, value in record.items() if isinstance(value, list)}
    return record | derived | lists | folders


def compared_fields(records: list[dict]) -> list[str]:
    """Returns the names of the fields that a table compares, with learning rates and steps at the end."""
    names = dict.fromkeys(name for record in records for name in record if name in dict(record["setting"]))
    unnamed = ("task", "shots", "shots_per_class", "base_model", "test_checksum", "test_size")
    return ["model", *(name for name in names if name not in unnamed), *TRAINING]


def papers_gain(record: dict) -> float | None:
    """Returns the gain of CE + SCL over CE in the paper, in percentage points, or None if the paper has no result."""
    is_papers_setup = record.get("batch_size") == 16 and record["noise"] in (None, "backtranslation")
    is_from_sst2 = is_transfer(record) and Path(record["base_model"]).name.startswith("sst2-")
    if record["loss"] != CE_SCL or not is_papers_setup or is_from_sst2 != bool(record["shots_per_class"]):
        return None
    ce, ce_scl = PAPER.get((record["task"], record["size"], record["noise_level"]), (None, None))
    return None if ce is None else ce_scl - ce


def is_transfer(record: dict) -> bool:
    """Returns whether the run started from a checkpoint of this project."""
    return record["base_model"] != record["model"].rstrip("/")


def describe(record: dict) -> str:
    return f"{record['task']}, N = {record['size']}, {record['method']}"


def first(row: Row) -> dict:
    """Returns one record of a table row, to read values that are the same in all records of the row."""
    return next(iter(row.values()))


def rates_and_steps(record: dict) -> tuple[str, ...]:
    """Returns the names of the learning rates and steps. For lam = 1, leaves out head_lr, which only stage 2 uses."""
    return ("lr", "steps") if record["lam"] == 1 else ("lr", "head_lr", "steps")


def matching_row(rows: dict[tuple, Row], loss: tuple, record: dict) -> Row:
    """Returns the row with `loss` (lam, tau, ce_temperature) that has the learning rates and steps of `record`.

    Tries three rules: the same learning rates, steps and eval_every; the same learning rates and steps; any values.
    Returns the row of the first rule that exactly one row fulfils. Without such a row, returns an empty dictionary.
    """
    names = rates_and_steps(record)
    candidates = [row for row in rows.values() if first(row)["loss"] == loss]
    for fields in ((*names, "eval_every"), names, ()):
        matching = [row for row in candidates if all(first(row)[name] == record[name] for name in fields)]
        if len(matching) == 1:
            return matching[0]
    return {}


def values(row: Row, name: str) -> np.ndarray:
    return np.array([record[name] for record in row.values()])


def paired_differences(row: Row, other: Row, *splits: str, measure: str = "test_accuracy") -> dict[int, float]:
    """Returns a dictionary that maps each seed that both table rows have to the difference `row` minus `other`.

    Checks that runs with the same seed used the same examples. The argument `splits` lists the splits to check, such as
    "test".
    """
    seeds = [seed for seed in sorted(row) if seed in other]
    for seed, split in itertools.product(seeds, splits):
        if other[seed][f"{split}_checksum"] != row[seed][f"{split}_checksum"]:
            raise UserError(f"argument RESULTS.jsonl: {other[seed]['method']} and {row[seed]['method']} have different "
                            f"{split} sets at seed {seed}: {other[seed]['run']} and {row[seed]['run']}")
    return {seed: row[seed][measure] - other[seed][measure] for seed in seeds}


def read_effects(files: list[str]) -> list[tuple[Row, Row]]:
    """Returns pairs of table rows: a row of CE + SCL (lam 0.9, tau 0.3), and the matching row of CE.

    Looks for the row of CE in all files. If no row or several rows match, looks only in the file of the CE + SCL row.
    Prints a message for each row of CE + SCL without a matching row of CE.
    """
    effects = []
    for rows in read_settings(files).values():
        for row in (row for row in rows.values() if first(row)["loss"] == CE_SCL):
            in_file = {key: other for key, other in rows.items() if first(other)["file"] == first(row)["file"]}
            ce = matching_row(rows, CE, first(row)) or matching_row(in_file, CE, first(row))
            if paired_differences(row, ce, "train", "validation", "test"):
                effects.append((row, ce))
            else:
                print(f"not drawn: {describe(first(row))}, because no row of CE has the same seeds, learning rates and "
                      "number of steps", file=sys.stderr)
    if not effects:
        raise UserError("argument RESULTS.jsonl: no seed has both --lam 0 and --lam 0.9 --tau 0.3")
    return effects


def read_grid(files: list[str]) -> tuple[dict[tuple, Row], Row]:
    """Returns two values: a dictionary that maps (lam, tau) to a table row, and the row of CE.

    Checks that all rows have the same setting, and that all pairs (lam, tau) have the same seeds.
    """
    settings = read_settings(files)
    if len(settings) > 1:
        one, other, *_ = settings
        name, _ = min(set(one) ^ set(other))
        found = " and ".join(dict(setting).get(name, "null") for setting in (one, other))
        raise UserError(f"argument RESULTS.jsonl: a grid needs one setting, but {name} is {found}")

    (rows,) = settings.values()
    of_scl = [row for row in rows.values() if first(row)["lam"] > 0]
    if not of_scl:
        raise UserError("argument RESULTS.jsonl: no run with --lam above 0 to draw")
    usual_row = min(of_scl, key=lambda row: first(row)["lam"] == 1)  # the first row with lam < 1, if there is one
    cells: dict[tuple, Row] = {}
    for row in of_scl:
        record, usual = first(row), first(usual_row)
        for name in (*rates_and_steps(record), "eval_every"):
            if record[name] != usual[name]:
                raise UserError(f"argument RESULTS.jsonl: {describe(record)} has {name} {record[name]}, "
                                f"{usual['method']} has {usual[name]}; a grid needs one {name}")
        if cells.setdefault((record["lam"], record["tau"]), row) is not row:
            raise UserError(f"argument RESULTS.jsonl: {describe(record)} has several values of head_lr; choose one")

    seeds = set().union(*cells.values())
    for row in cells.values():
        if missing := seeds - set(row):
            raise UserError(f"argument RESULTS.jsonl: {describe(first(row))} lacks seed {min(missing)}, which another "
                            "cell has; run what is missing")
    ce = matching_row(rows, CE, first(usual_row))
    for row in (*of_scl, ce):
        paired_differences(row, usual_row, "train", "validation")
    return cells, {seed: ce[seed] for seed in seeds} if seeds <= set(ce) else {}
