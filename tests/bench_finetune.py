"""Compares finetune.py with transformers' Trainer: same encoder, data, batches and steps.

Run this file by hand, on a machine without other work:

    pip install --no-deps accelerate psutil
    python tests/bench_finetune.py --data-dir glue --model all-MiniLM-L6-v2

Prints four tables in markdown:
1. The time of a step. Both train in one process, in turns; the table has medians over rounds.
2. The time of a sweep, from the start of the command to the last record: five seeds of 100 examples, with 60 steps and
   three validations each. finetune.py needs one process, Trainer one process of this file for each seed.
3. Evaluated examples per second, sorted by length (finetune.py) and in the order of the file (Trainer).
4. The share of SCL in a step of RoBERTa-base with random weights.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import finetune
from eval import print_table
from parts import pretrained
from parts.data import Split, sample
from parts.model import EVAL_BATCH, Model, predict
from parts.records import configure
from parts.state import Training
from parts.tasks import load_data

ROOT = Path(finetune.__file__).parent
STEPS, EVERY, SHOTS, SEEDS = 60, 20, 100, 5


def flags(args):
    values = {"task": "sst2", "data-dir": args.data_dir, "model": args.model, "lr": 1e-4, "shots": SHOTS,
              "max-steps": STEPS, "eval-every": EVERY}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def setting(args, **changes):
    """Returns the splits, a new model and the setting of a run."""
    parsed = finetune.parse_args(flags(args))
    data = load_data("sst2", args.data_dir, few_shot=True)
    splits = sample(data, SHOTS, None, args.seed)
    tokenizer = pretrained.load_tokenizer(args.model, "cls")
    torch.manual_seed(args.seed)
    model = pretrained.load_model(args.model, "cls", data.label_names, tokenizer, dropout=0.1)
    config = configure(parsed, 0.9, 0.3, 1e-4, args.seed, splits, data.label_names, tokenizer.model_max_length, 1)
    return splits, model, config | changes


def rows(tokenizer, split):
    texts = map(list, zip(*split.texts, strict=True))
    tokens = tokenizer(*texts, truncation=True, max_length=256)
    return [{name: tokens[name][row] for name in tokens} | {"labels": int(label)}
            for row, label in enumerate(split.labels)]


def trainer(model, train, validation=None, steps=STEPS):
    tokenizer = model.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, per_device_eval_batch_size=64, learning_rate=1e-4,
            weight_decay=0.1, warmup_steps=0.06, dataloader_drop_last=True, report_to=[], disable_tqdm=True,
            eval_strategy="steps" if validation else "no", eval_steps=EVERY, logging_steps=EVERY, use_cpu=True,
            save_strategy="steps" if validation else "no", save_steps=EVERY, load_best_model_at_end=bool(validation),
            metric_for_best_model="accuracy" if validation else None, save_total_limit=1)
        worker = transformers.Trainer(
            model.backbone, arguments, train_dataset=rows(tokenizer, train), processing_class=tokenizer,
            eval_dataset=rows(tokenizer, validation) if validation else None,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())})
        start = time.perf_counter()
        worker.train()
        return worker, time.perf_counter() - start


def trainer_run(args):
    """Trains one seed as a script with Trainer does: with validations, keeps the best checkpoint, then tests it."""
    (train, validation, test), model, _ = setting(args)
    worker, _ = trainer(model, train, validation)
    worker.predict(rows(model.tokenizer, test))


def ours(model, train, validation, config):
    training = Training(model, config)
    start = time.perf_counter()
    finetune.fit(training, train, validation)
    return time.perf_counter() - start


def step_times(args, rounds=5, steps=20):
    (train, *_), *_ = setting(args)
    nothing = Split([("a",)], np.zeros(1, dtype=int))  # validates on one word, once
    seconds: dict[str, list[float]] = {"Trainer, CE": [], "CE": [], "CE + SCL": []}
    for _ in range(rounds):
        for name, values in seconds.items():
            *_, model, config = setting(args, steps=steps, eval_every=steps, lam=0.0 if name == "CE" else 0.9)
            with contextlib.redirect_stdout(io.StringIO()):  # hides the lines of both programs
                values.append((trainer(model, train, steps=steps)[1] if name == "Trainer, CE" else
                               ours(model, train, nothing, config)) / steps)
    return [[name, f"{1e3 * statistics.median(values):.0f}", ratio(values, seconds["Trainer, CE"])]
            for name, values in seconds.items()]


def ratio(ones, others):
    low, median, high = statistics.quantiles([one / other for one, other in zip(ones, others, strict=True)])
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def sweep_times(args):
    def seconds(*command):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        return time.perf_counter() - start

    seeds = list(map(str, range(SEEDS)))
    with tempfile.TemporaryDirectory() as out:
        one = seconds(str(ROOT / "finetune.py"), *flags(args), "--out", out, "--seed", *seeds)
    data = ["--data-dir", args.data_dir, "--model", args.model]
    many = sum(seconds(__file__, *data, "--seed", seed, "--trainer") for seed in seeds)
    return [[f"Trainer, {SEEDS} processes", f"{many:.0f}", "1"],
            ["finetune.py, one process", f"{one:.0f}", f"{one / many:.2f}"]]


def evaluation_speed(args, rounds=3):
    (_, validation, _), model, _ = setting(args)
    seconds: dict[str, list[float]] = {"in the order of the file": [], "by length": []}
    for _ in range(rounds):
        for name, values in seconds.items():
            start = time.perf_counter()
            if name == "by length":
                predict(model, validation)
            else:
                model.eval()
                with torch.inference_mode():
                    for first in range(0, len(validation), EVAL_BATCH):
                        model(**model.tokenize(validation.texts[first : first + EVAL_BATCH]))
            values.append(len(validation) / (time.perf_counter() - start))
    return [[name, f"{statistics.median(values):.0f}"] for name, values in seconds.items()]


def share_of_scl(rounds=3):
    config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    model = Model(transformers.AutoModelForSequenceClassification.from_config(config), tokenizer=None)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens, labels = torch.randint(5, 50000, (16, 128)), torch.arange(16) % 2
    mask, step, scl = torch.ones_like(tokens), [], []
    for _ in range(rounds):
        start = time.perf_counter()
        class_logits, features = model(input_ids=tokens, attention_mask=mask)
        torch.nn.functional.cross_entropy(class_logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        step.append(time.perf_counter() - start)
        features = features.detach().requires_grad_()
        start = time.perf_counter()
        for _ in range(100):
            finetune.scl_loss(features, labels).backward()
            finetune.scl_bounds(labels)
        scl.append((time.perf_counter() - start) / 100)
    step_time, scl_time = statistics.median(step), statistics.median(scl)
    return [[f"{step_time:.2f} s", f"{1e3 * scl_time:.2f} ms", f"{100 * scl_time / step_time:.3f} %"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainer", action="store_true", help="do one run of Trainer, for the sweep")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.trainer:
        return trainer_run(args)
    print(f"PyTorch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads\n")
    print_table(["a step of 16", "ms", "of Trainer's"], step_times(args))
    print()
    print_table(["five seeds", "s", "of Trainer's"], sweep_times(args))
    print()
    print_table(["evaluation", "examples a second"], evaluation_speed(args))
    print()
    print_table(["RoBERTa-base, 16 x 128: a step", "SCL and its bounds", "share"], share_of_scl())


if __name__ == "__main__":
    main()
