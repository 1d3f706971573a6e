"""Prints the table "What to use" of README.md from the committed records.

    python results/decision.py

A row is an encoder, a data set and a number of examples. Each method has the hyperparameters with the best mean
validation accuracy. All means of a row have the same seeds, so the same training and test examples. The difference
uses all seeds that were run with both of its methods.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import print_table
from parts.records import read_records
from parts.settings import CE, CE_SCL, Row, first, paired_differences, read_settings, shown, values
from parts.statistics import difference, percent, t_interval
from parts.tasks import TASKS

HERE = Path(__file__).parent
FILES = ("base-head-lr.jsonl", "base.jsonl", "base-trec6.jsonl", "base-cr.jsonl", "base-qnli/results.jsonl",
         "few-shot.jsonl", "few-shot-cls.jsonl", "trec6.jsonl")
BASELINES = HERE / "baselines" / "results.jsonl"
METHODS = {CE: "CE", CE_SCL: "CE + SCL"}
FROZEN, SETFIT = "logistic regression, mean", "SetFit"
CLASSES = {"TREC6": 6, "CR": 2} | {name: len(task.labels) for name, task in TASKS.items()}
FEWEST = 5  # pairs for advice


def best_row(rows: list[Row]) -> Row:
    """Returns the row with the best mean validation accuracy. Ignores rows with fewer seeds than the longest row."""
    longest = [row for row in rows if len(row) == max(map(len, rows))]
    return max(longest, key=lambda row: values(row, "validation_accuracy").mean())


def read_tuned() -> dict[tuple, Row]:
    """Returns the best row of CE and of CE + SCL for each (encoder, task, shots, method)."""
    found: dict[tuple, list[Row]] = {}
    for rows in read_settings([str(HERE / name) for name in FILES]).values():
        for row in rows.values():
            record = shown(first(row))
            if record["loss"] in METHODS:
                key = record["model"], record["task"], record["size"], METHODS[record["loss"]]
                found.setdefault(key, []).append(row)
    return {key: best_row(rows) for key, rows in found.items()}


def read_baselines() -> dict[tuple, Row]:
    """Returns the records of logistic regression and SetFit for each (encoder, task, shots, method)."""
    rows: dict[tuple, Row] = {}
    for record in read_records(BASELINES):
        encoder = record.get("encoder", "all-MiniLM-L6-v2")  # the oldest records lack the encoder
        key = encoder, record["task"], str(record["shots"]), record["method"]
        rows.setdefault(key, {})[record["seed"]] = record
    return rows


def advice(task: str, best: str, means: dict[str, float], interval: tuple[float, float, float], n: int) -> str:
    if n < FEWEST:
        return "These are too few pairs for advice."
    if max(means.values()) < 1 / CLASSES[task] + 0.05:
        return "Label more examples: every method is near chance."
    _, low, high = interval
    if low > 0:
        return "Use CE + SCL."
    return f"Use {best}." if high < 0 else f"Start with {best}; the interval contains 0."


def table() -> None:
    all_rows, lines, names = read_tuned() | read_baselines(), [], (FROZEN, SETFIT, "CE", "CE + SCL")
    for encoder, task, shots in dict.fromkeys(key[:3] for key in all_rows):
        rows = {name: row for name in names if (row := all_rows.get((encoder, task, shots, name)))}
        if not {"CE", "CE + SCL"} <= rows.keys():
            continue
        seeds = set.intersection(*map(set, rows.values()))
        means = {name: np.mean([row[seed]["test_accuracy"] for seed in seeds]) for name, row in rows.items()}
        best = max((name for name in rows if name != "CE + SCL"), key=means.get)
        differences = paired_differences(rows["CE + SCL"], rows[best], "train", "test")
        interval, n = t_interval(differences), len(differences)
        best_name = best.removesuffix(", mean")
        accuracies = [percent(means[name]) if name in means else None for name in names]
        lines.append([encoder, task, shots, len(seeds), *accuracies, f"{difference(*interval)}, {best_name}, n = {n}",
                      advice(task, best_name, means, interval, n)])
    print_table(["encoder", "data set", "shots", "n", "logistic regression", "SetFit", "CE", "CE + SCL",
                 "CE + SCL minus the best other [95 %]", "what to use"], lines)


if __name__ == "__main__":
    table()
