"""What one would try instead of fine-tuning, on the samples and splits of finetune.py.

    pip install setfit==1.2.0
    python results/baselines.py            # appends to results/baselines/results.jsonl what it lacks; needs glue
                                           # and all-MiniLM-L6-v2 (see README.md) in the working folder
    python results/baselines.py table      # logistic regression and SetFit beside few-shot.jsonl, in markdown

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

ENCODER, GLUE, STEPS = "all-MiniLM-L6-v2", "glue", 200
TASKS = ("sst2", "qnli", "mnli")
RESULTS = HERE / "baselines" / "results.jsonl"


def frozen_features(splits: list[Split], tokenizer, pooling: str, names: tuple[str, ...]) -> list[np.ndarray]:
    model = finetune.load_model(ENCODER, pooling, names, tokenizer, 0.0)
    return [finetune.predict(model, split, "bf16")[1] for split in splits]


def setfit(train: Split, test: Split, seed: int) -> float:
    import datasets
    from setfit import SetFitModel, Trainer, TrainingArguments

    texts = [[text for (text,) in split.texts] for split in (train, test)]
    model = SetFitModel.from_pretrained(ENCODER, head_params={"max_iter": 1000})
    settings = TrainingArguments(max_steps=STEPS, seed=seed, report_to="none", save_strategy="no", logging_steps=STEPS)
    rows = datasets.Dataset.from_dict({"text": texts[0], "label": train.labels})
    Trainer(model=model, args=settings, train_dataset=rows).train()
    return float((np.asarray(model.predict(texts[1])) == test.labels).mean())


def run(task: str, shots: int, method: str, seeds: range) -> None:
    done = {tuple(record[name] for name in ("task", "shots", "method", "seed")) for record in records()}
    if not (missing := [seed for seed in seeds if (task, shots, method, seed) not in done]):
        return
    data = load_data(task, GLUE, few_shot=True)
    tokenizer = finetune.load_tokenizer(ENCODER, "cls")
    pooling = method.split()[-1]
    if method != "SetFit":
        (test_features,) = frozen_features([data.test], tokenizer, pooling, data.label_names)
    for seed in missing:
        started = time.perf_counter()
        train, _, test = sample(data, shots, None, seed)
        if method == "SetFit":
            accuracy = setfit(train, test, seed)
        else:
            (features,) = frozen_features([train], tokenizer, pooling, data.label_names)
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, train.labels)
            accuracy = classifier.score(test_features, test.labels)
        finetune.append_record(RESULTS, {
            "run": f"{task}-n{shots}-{method}-seed{seed}", "task": task, "shots": shots, "method": method, "seed": seed,
            "train_checksum": train.checksum, "test_checksum": test.checksum, "test_accuracy": accuracy,
            "seconds": round(time.perf_counter() - started, 1), "commit": finetune.COMMIT,
        })
        print(f"{task}, N = {shots}, {method}, seed {seed}: {accuracy:.3f}", flush=True)


def records() -> list[dict]:
    return read_records(RESULTS) if RESULTS.exists() else []


def table() -> None:
    few_shot = evaluate.read_arms([str(HERE / "few-shot.jsonl")])
    tuned = {setting[:2]: methods for setting, methods in few_shot.items() if "mean" in setting}
    arms: dict[tuple, evaluate.Arm] = {}
    for record in sorted(records(), key=lambda record: (TASKS.index(record["task"]), record["shots"])):
        arms.setdefault((record["task"], str(record["shots"]), record["method"]), {})[record["seed"]] = record
    rows = []
    for (task, shots, method), arm in arms.items():
        if (task, shots) not in tuned:
            continue  # not fine-tuned yet
        test = evaluate.values(arm, "test_accuracy")
        rows.append([task, shots, method, evaluate.percent(test.mean(), test.std(ddof=1)), len(arm)])
        for key in (evaluate.CE, evaluate.CE_SCL):
            differences = evaluate.paired_differences(tuned[task, shots][key], arm, "train", "test")
            rows[-1].append(evaluate.difference(*evaluate.t_interval(differences)))
    evaluate.print_table(["task", "shots", "instead", "all seeds", "n", "CE minus it [95 %]",
                          "CE + SCL minus it [95 %]"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["table"])
    transformers.logging.set_verbosity_error()
    if parser.parse_args().command == "table":
        table()
    else:
        for task, shots, pooling in itertools.product(TASKS, (20, 100), ("cls", "mean")):
            run(task, shots, f"logistic regression, {pooling}", range(10))
        for shots in (20, 100):
            run("sst2", shots, "SetFit", range(5))
