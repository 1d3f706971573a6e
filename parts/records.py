"""Reads and writes records. A record is a line of results.jsonl with the flags and the results of a finished run."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from parts.data import Split
from parts.errors import UserError, first_line, one_line

MACHINE_FLAGS = ("data_dir", "device", "out", "save", "save_every", "dry_run")  # flags without effect on the results
ARM_AND_SEED = re.compile(r"(.+)-seed\d+-[0-9a-f]{6}$")  # name of a run: arm (task and method), seed, digest


def configure(args: Namespace, lam: float, tau: float | None, lr: float | None, seed: int,
              splits: tuple[Split, ...], label_names: tuple[str, ...], max_length: int,
              processes: int) -> dict:
    """Returns all values that define a run, including defaults. The run's name ends with a digest of the values."""
    train_size = len(splits[0])
    batch_size = min(args.batch_size, train_size)
    if batch_size % processes:
        raise UserError(f"argument --batch-size: expected a multiple of {processes}, one share for each process, "
                        f"got {batch_size}" + (" (all training examples)" if batch_size < args.batch_size else ""))
    per_epoch = max(1, train_size // args.batch_size)
    steps_by_epochs = math.ceil(args.epochs * per_epoch) if args.epochs else max(10 * per_epoch, 200)
    steps = args.max_steps or steps_by_epochs
    lr = lr or (1e-3 if args.model == "demo" else 1e-5)

    config = {name: value for name, value in vars(args).items() if name not in ("epochs", "max_steps", *MACHINE_FLAGS)}
    config |= {"lam": lam, "tau": tau, "seed": seed, "lr": lr, "head_lr": args.head_lr or (1e-3 if lam == 1 else lr)}
    config |= {"steps": steps, "eval_every": args.eval_every or math.ceil(steps / 10)}
    config |= {"max_length": max_length, "processes": processes}
    for name, split in zip(("train", "validation", "test"), splits, strict=True):
        config |= {f"{name}_size": len(split), f"{name}_checksum": split.checksum}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:6]

    task = Path(args.task).resolve().name.encode()[:100].decode(errors="ignore")  # file names are limited to 255 bytes
    arm = f"{task}-n{train_size}-" + (f"lam{lam:g}-tau{tau:g}" if lam else "lam0")
    names = {"run": f"{arm}-seed{seed}-{digest}", "arm": arm, "base_model": base_model(args.model)}
    label_checksum = hashlib.sha256(json.dumps(label_names).encode()).hexdigest()[:12]
    return names | config | {"data_dir": args.data_dir, "num_texts": len(splits[0].texts[0]),
                             "label_checksum": label_checksum}


def base_model(model: str) -> str:
    """Returns the name of a model. If the model is a checkpoint of this project, removes method and seed from the name.

    In a transfer experiment, CE starts from a checkpoint of CE, and CE + SCL from a checkpoint of CE + SCL. For a
    comparison, CE and CE + SCL need the same model name.
    """
    arm = ARM_AND_SEED.match(model.rstrip("/"))
    return re.sub(r"-lam[\d.e-]+(-tau[\d.e+-]+)?$", "", arm[1]) if arm else model.rstrip("/")


def print_setting(config: dict, splits: tuple[Split, ...], names: tuple[str, ...], summary: str,
                  warnings: list[str]) -> None:
    """Prints the model, the data and the hyperparameters of a run.

    The tuple `names` has the class names. The text `summary` describes the classifier and the size of the model.
    """
    train, validation, _ = splits
    noise = f" with {config['noise']} noise {config['noise_level']:g}" if config["noise"] else ""
    batch_size = min(config["batch_size"], len(train))
    print(f"{config['model']} with {summary}; {config['pooling']} pooling, lr {config['lr']:g}, {config['steps']} "
          f"steps of {batch_size} examples")
    for name, split in zip(("train", "validation", "test"), splits, strict=True):
        sizes = split.class_sizes(len(names))
        counts = [f"{one_line(label)}: {size}" for label, size in zip(names, sizes, strict=True)]
        more = f", {len(counts) - 9} more classes" if len(counts) > 9 else ""
        print(f"  {name}: {len(split)} examples{noise if name == 'train' else ''} ({', '.join(counts[:9])}{more})")
    for texts, label in zip(train.texts[:3], train.labels, strict=False):
        print(f"  {one_line(names[label])}: {' | '.join(one_line(text, 60) for text in texts)}")

    train_sizes = train.class_sizes(len(names))
    if missing := [one_line(name) for name, size in zip(names, train_sizes, strict=True) if not size]:
        warnings = [*warnings, f"no training example of {', '.join(missing)}, so the model cannot learn this class"]
    if len(validation) < 50:
        warnings = [*warnings, f"only {len(validation)} validation examples choose the checkpoint"]
    for warning in warnings:
        print(f"  warning: {warning}")
    if config["model"] == "demo":
        print("  this run is only a smoke test, because the encoder is tiny and starts from random weights")


def time_left(durations: list[float], runs: int) -> str:
    """Returns an estimate such as ", about 5 min left", from the durations of the finished runs in seconds."""
    if not durations:
        return ""
    minutes = runs * sum(durations) / len(durations) / 60
    return f", about {minutes:.0f} min left" if minutes < 120 else f", about {minutes / 60:.1f} h left"


def print_result(record: dict, test: Split, names: tuple[str, ...]) -> None:
    sizes = test.class_sizes(len(names))
    largest, share = one_line(names[sizes.argmax()]), sizes.max() / len(test)
    print("test accuracy {test_accuracy:.3f}, validation {validation_accuracy:.3f} at step {best_step}, "
          "{seconds:.0f} s".format(**record) + f"; largest class: {share:.3f} ({largest})")
    if record["test_accuracy"] < share:
        print(f"  warning: a classifier that always predicts {largest} is more accurate than this run")
    if record["lam"]:
        scl, lowest, collapsed = (record[name] for name in ("scl", "scl_lowest", "scl_collapsed"))
        if collapsed - scl < 0.1 * (collapsed - lowest):
            print("  warning: the SCL loss did not fall: scl is still near its value for equal features (collapsed); "
                  "raise --lr or --max-steps")


def checkpoint_note(folder: Path, keep: bool) -> str:
    if keep:
        return f"checkpoint in {folder}"
    if folder.is_dir():
        return f"no checkpoint; {folder} has the checkpoint of an earlier run with this name"
    return "no checkpoint; --save keeps checkpoints in a sweep"


def read_records(file: Path, quiet: bool = False) -> list[dict]:
    """Reads the records of a file, oldest first.

    Skips lines that are not records, and prints a message for each skipped line unless `quiet` is true.
    """
    records = []
    text = file.read_text(encoding="utf-8", errors="replace") if os.path.isfile(file) else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("run"), str):
            records.append(record)
        elif not quiet:
            print(f"{file}, line {number} is not a record; the line was skipped", file=sys.stderr)
    return records


def find_record(results: Path, config: dict) -> dict | None:
    """Returns the record of a run, or None. Rejects a record that has the name of the run, but other values."""
    for record in read_records(results, quiet=True):
        if record["run"] == config["run"]:
            if field := differing_field(config, record):
                raise UserError(f"argument --out: {results} has a record of this name with other {field}; choose "
                                f"another folder, or delete the line of {record['run']}")
            return record
    return None


def differing_field(config: dict, other: dict) -> str | None:
    """Returns the name of a field that has another value in a record or saved state with the same run name, or None."""
    for name, value in config.items():
        if name != "data_dir" and other.get(name, value) != value:  # old records lack some fields
            return "class names" if name == "label_checksum" else name
    return None


def open_results(out: Path) -> None:
    """Checks before training that the program can write to results.jsonl."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        open(out / "results.jsonl", "ab").close()
    except OSError as error:
        raise UserError(f"argument --out: {out / 'results.jsonl'} cannot be written ({error.strerror}); choose another "
                        "folder") from None


def append_record(file: Path, record: dict) -> None:
    """Appends a record, unless the file has a record of the same run. If the last line has no line break, adds one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as results:
        fcntl.flock(results, fcntl.LOCK_EX)
        if record["run"] in {other["run"] for other in read_records(file, quiet=True)}:
            return
        is_incomplete = file.stat().st_size and not file.read_bytes().endswith(b"\n")
        results.write(b"\n" * bool(is_incomplete) + json.dumps(record).encode() + b"\n")


def method_name(record: dict) -> str:
    if record["lam"] == 1:
        return f"SCL ({record['tau']:g}), then CE"
    if record["ce_temperature"]:
        return f"CE on normalised features ({record['ce_temperature']:g})"
    return f"CE + SCL ({record['lam']:g}, {record['tau']:g})" if record["lam"] else "CE"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path. When the `with` block ends, the file or folder at the temporary path replaces `path`.

    A process that is killed during writing leaves no incomplete file at `path`.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(part)  # a killed process may have left a temporary file or folder
    try:
        yield part
        if path.is_dir():  # `replace` cannot overwrite a folder
            remove(path)
        part.replace(path)
    except Exception as error:  # a full disk can raise any type of exception
        raise UserError(f"{path} cannot be written ({first_line(error)}); make room, end other processes that write "
                        "the same path, and repeat the command") from error
    finally:
        remove(part)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def git_commit() -> str | None:
    """Returns the commit of this code, or None if this file does not belong to a git repository."""
    here = Path(__file__)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(here.parent)]
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        return subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return None
