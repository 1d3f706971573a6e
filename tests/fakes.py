"""Records of runs that were never made, for the tests of eval.py and its modules."""

import itertools
import json

from conftest import write_lines

RUNS = itertools.count()


def fake(seed, lam, test, validation=0.5, **other):
    """Returns a record as finetune.py writes it."""
    return {
        "run": f"run{next(RUNS)}", "task": "sst2", "shots": 20, "shots_per_class": None, "model": "encoder",
        "pooling": "cls", "noise": None, "noise_level": None, "translators": None, "batch_size": 16,
        "sampler": "shuffled", "precision": "fp32", "dropout": 0.1, "max_length": 256, "weight_decay": 0.1,
        "warmup_ratio": 0.06, "lr": 1e-5, "head_lr": 1e-5, "steps": 200, "eval_every": 20, "lam": lam,
        "tau": 0.3 if lam else None, "ce_temperature": None, "seed": seed, "data_dir": None,
        "train_checksum": f"{seed}", "validation_checksum": f"{seed}", "test_checksum": "t", "test_size": 400,
        "validation_accuracy": validation, "test_accuracy": test, "seconds": 60, "device": "cpu", "python": "3",
        "torch": "2", "transformers": "5", "commit": None,
    } | other


def pairs(gains, ce=0.8, **other):
    """Returns CE, and CE + SCL (0.9, 0.3) with these gains on CE, seed by seed."""
    return [fake(seed, lam, ce + gain * (lam > 0), **other) for seed, gain in enumerate(gains) for lam in (0, 0.9)]


def write(tmp_path, *records, name="results.jsonl"):
    write_lines(tmp_path / name, map(json.dumps, records))
    return tmp_path / name
