"""Compares fine-tuning with two simpler methods, on the training sets and splits of finetune.py.

    pip install setfit==1.2.0
    python results/baselines.py            # appends the missing records to results/baselines/results.jsonl; needs glue,
                                           # own and the two encoders (see README.md) in the working folder
    python results/baselines.py table      # prints the comparison in markdown

The first method is logistic regression of scikit-learn. It reads standardised features of the frozen encoder: the first
token or the mean. The second method is SetFit (Tunstall et al., 2022), for tasks of one sentence. SetFit trains the
encoder on pairs and then a logistic regression. Except for the number of steps, SetFit has its default settings.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parent.parent))
from decision import BASELINES, METHODS, read_baselines, read_tuned
from eval import print_table
from parts import pretrained
from parts.data import Split, sample
from parts.model import predict
from parts.records import append_record, git_commit, read_records
from parts.settings import paired_differences, values
from parts.statistics import difference, spread, t_interval
from parts.tasks import load_data

SMALL, BASE = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
STEPS = {SMALL: 200, BASE: 100}  # steps of SetFit; CE + SCL has the same number of steps, except in base.jsonl
TREC6, CR = "own/TREC6", "own/CR"  # folders with train.tsv and test.tsv
ORDER = ("sst2", "qnli", "mnli", "TREC6", "CR")


def setfit(encoder: str, train: Split, test: Split, seed: int) -> float:
    import datasets
    from setfit import SetFitModel, Trainer, TrainingArguments

    texts = [[text for (text,) in split.texts] for split in (train, test)]
    model = SetFitModel.from_pretrained(encoder, head_params={"max_iter": 1000})
    settings = TrainingArguments(max_steps=STEPS[encoder], seed=seed, report_to="none", save_strategy="no")
    rows = datasets.Dataset.from_dict({"text": texts[0], "label": train.labels})
    Trainer(model=model, args=settings, train_dataset=rows).train()
    return float((np.asarray(model.predict(texts[1])) == test.labels).mean())


def run(encoder: str, task: str, shots: int, method: str, seeds: range) -> None:
    """Appends the records that are missing. TREC-6 and CR have this number of shots for each class."""
    done, name, per_class = {record["run"] for record in read_records(BASELINES)}, Path(task).name, task in (TREC6, CR)
    names = {seed: f"{'' if encoder == SMALL else f'{encoder}-'}{name}-n{shots}-{method}-seed{seed}" for seed in seeds}
    if not (missing := [seed for seed in seeds if names[seed] not in done]):
        return
    data = load_data(task, None if per_class else "glue", few_shot=True)
    if method != "SetFit":
        pooling = method.split()[-1]
        tokenizer = pretrained.load_tokenizer(encoder, "cls")
        model = pretrained.load_model(encoder, pooling, data.label_names, tokenizer, 0.0)
        _, test_features = predict(model, data.test)
    for seed in missing:
        started = time.perf_counter()
        train, _, test = sample(data, *((None, shots) if per_class else (shots, None)), seed)
        if method == "SetFit":
            accuracy = setfit(encoder, train, test, seed)
        else:
            _, features = predict(model, train)
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, train.labels)
            accuracy = classifier.score(test_features, test.labels)
        append_record(BASELINES, {
            "run": names[seed], "encoder": encoder, "task": name, "method": method, "seed": seed,
            "shots": f"{shots} a class" if per_class else shots,
            "train_checksum": train.checksum, "test_checksum": test.checksum, "test_accuracy": accuracy,
            "seconds": round(time.perf_counter() - started, 1), "commit": git_commit(),
        })
        print(f"{task}, N = {shots}, {method}, seed {seed}: {accuracy:.3f}", flush=True)


def table() -> None:
    tuned, baselines, lines = read_tuned(), read_baselines(), []
    for key in sorted(baselines, key=lambda key: (key[0], ORDER.index(key[1]), len(key[2]), key)):
        row = baselines[key]
        lines.append([*key, spread(100 * values(row, "test_accuracy"), 1), len(row)])
        for method in METHODS.values():
            differences = paired_differences(tuned.get((*key[:3], method), {}), row, "train", "test")
            lines[-1].append(difference(*t_interval(differences)) if differences else None)
    print_table(["encoder", "task", "shots", "method", "all seeds", "n", "CE minus this method [95 %]",
                 "CE + SCL minus this method [95 %]"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["table"])
    transformers.logging.set_verbosity_error()
    if parser.parse_args().command == "table":
        table()
    else:
        for encoder, pooling in itertools.product((SMALL, BASE), ("cls", "mean")):
            run(encoder, TREC6, 10, f"logistic regression, {pooling}", range(10))
        for task, shots, pooling in itertools.product(ORDER[:3], (20, 100), ("cls", "mean")):
            run(SMALL, task, shots, f"logistic regression, {pooling}", range(10))
        for shots, pooling in itertools.product((20, 100), ("cls", "mean")):
            run(BASE, "sst2", shots, f"logistic regression, {pooling}", range(10))
        for pooling in ("cls", "mean"):
            run(BASE, CR, 10, f"logistic regression, {pooling}", range(10))
        for encoder, shots in itertools.product((SMALL, BASE), (20, 100)):
            run(encoder, "sst2", shots, "SetFit", range(5))
        for encoder, task in ((SMALL, TREC6), (BASE, TREC6), (BASE, CR)):
            run(encoder, task, 10, "SetFit", range(5))
