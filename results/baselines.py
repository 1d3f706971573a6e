"""What one would try instead of fine-tuning, on the samples and splits of finetune.py.

    pip install setfit==1.2.0
    python results/baselines.py            # appends to results/baselines/results.jsonl what it lacks; needs glue and
                                           # the two encoders (see README.md) in the working folder
    python results/baselines.py table      # logistic regression and SetFit beside fine-tuning, in markdown

Logistic regression of scikit-learn on standardised features of the frozen encoder, its first token or its mean.
SetFit (Tunstall et al., 2022), for tasks of one sentence: contrastive training on pairs, then logistic regression; its
own settings but for the length, which is that of CE + SCL here, 200 steps of 16.
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

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import eval as evaluate  # noqa: E402
import finetune  # noqa: E402
from data import Split, load_data, read_records, sample  # noqa: E402

GLUE, STEPS = "glue", 200
SMALL, BASE = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
TUNED = {SMALL: ("few-shot.jsonl", "mean"), BASE: ("base.jsonl", "cls")}  # records of fine-tuning, and their pooling
TASKS = ("sst2", "qnli", "mnli")
RESULTS = HERE / "baselines" / "results.jsonl"


def setfit(encoder: str, train: Split, test: Split, seed: int) -> float:
    import datasets
    from setfit import SetFitModel, Trainer, TrainingArguments

    texts = [[text for (text,) in split.texts] for split in (train, test)]
    model = SetFitModel.from_pretrained(encoder, head_params={"max_iter": 1000})
    settings = TrainingArguments(max_steps=STEPS, seed=seed, report_to="none", save_strategy="no", logging_steps=STEPS)
    rows = datasets.Dataset.from_dict({"text": texts[0], "label": train.labels})
    Trainer(model=model, args=settings, train_dataset=rows).train()
    return float((np.asarray(model.predict(texts[1])) == test.labels).mean())


def run(encoder: str, task: str, shots: int, method: str, seeds: range) -> None:
    done = {record["run"] for record in read_records(RESULTS)}
    names = {seed: f"{'' if encoder == SMALL else f'{encoder}-'}{task}-n{shots}-{method}-seed{seed}" for seed in seeds}
    if not (missing := [seed for seed in seeds if names[seed] not in done]):
        return
    data = load_data(task, GLUE, few_shot=True)
    if method != "SetFit":
        pooling = method.split()[-1]
        tokenizer = finetune.load_tokenizer(encoder, "cls")
        model = finetune.load_model(encoder, pooling, data.label_names, tokenizer, 0.0)
        _, test_features = finetune.predict(model, data.test, "bf16")
    for seed in missing:
        started = time.perf_counter()
        train, _, test = sample(data, shots, None, seed)
        if method == "SetFit":
            accuracy = setfit(encoder, train, test, seed)
        else:
            _, features = finetune.predict(model, train, "bf16")
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, train.labels)
            accuracy = classifier.score(test_features, test.labels)
        finetune.append_record(RESULTS, {
            "run": names[seed], "encoder": encoder, "task": task, "shots": shots, "method": method, "seed": seed,
            "train_checksum": train.checksum, "test_checksum": test.checksum, "test_accuracy": accuracy,
            "seconds": round(time.perf_counter() - started, 1), "commit": finetune.COMMIT,
        })
        print(f"{task}, N = {shots}, {method}, seed {seed}: {accuracy:.3f}", flush=True)


def table() -> None:
    tuned: dict[tuple, dict] = {}
    for encoder, (file, pooling) in TUNED.items():
        for (task, shots, *rest), arms in evaluate.read_arms([str(HERE / file)]).items():
            if pooling in rest:
                tuned[encoder, task, shots] = arms
    arms: dict[tuple, evaluate.Arm] = {}
    for record in read_records(RESULTS):  # the first ones, of the small encoder, do not name it
        key = record.get("encoder", SMALL), record["task"], str(record["shots"]), record["method"]
        arms.setdefault(key, {})[record["seed"]] = record
    order = sorted(arms, key=lambda key: (key[0], TASKS.index(key[1]), int(key[2])))
    rows = []
    for encoder, task, shots, method in order:
        arm = arms[encoder, task, shots, method]
        test = evaluate.values(arm, "test_accuracy")
        rows.append([encoder, task, shots, method, evaluate.percent(test.mean(), test.std(ddof=1)), len(arm)])
        for key in (evaluate.CE, evaluate.CE_SCL):
            differences = evaluate.paired_differences(tuned[encoder, task, shots][key], arm, "train", "test")
            rows[-1].append(evaluate.difference(*evaluate.t_interval(differences)))
    evaluate.print_table(["encoder", "task", "shots", "instead", "all seeds", "n", "CE minus it [95 %]",
                          "CE + SCL minus it [95 %]"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["table"])
    transformers.logging.set_verbosity_error()
    if parser.parse_args().command == "table":
        table()
    else:
        for task, shots, pooling in itertools.product(TASKS, (20, 100), ("cls", "mean")):
            run(SMALL, task, shots, f"logistic regression, {pooling}", range(10))
        for shots, pooling in itertools.product((20, 100), ("cls", "mean")):
            run(BASE, "sst2", shots, f"logistic regression, {pooling}", range(10))
        for shots in (20, 100):
            run(SMALL, "sst2", shots, "SetFit", range(5))
