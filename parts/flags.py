"""Defines types of command-line arguments, and checks flags in ways that argparse does not offer.

This module does not import torch, so that --help is fast.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from parts.errors import UserError, explain_errors, one_line
from parts.tasks import TASKS, find_files

DEFAULT_MODEL = "FacebookAI/roberta-large"
TRANSLATORS = ["Helsinki-NLP/opus-mt-en-de", "Helsinki-NLP/opus-mt-de-en"]


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a wrong argument. Plain argparse would print the usage of the program before the error.

    Rejects an empty argument, such as the value of a shell variable that is not set, and an argument that is not UTF-8.
    Rejects a flag such as --seed if it occurs twice, because argparse would ignore the values of the first --seed.
    """

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for previous, text in zip(["", *args], args, strict=False):
            flag, _, value = text.partition("=") if re.match("--[a-z-]+=", text) else (previous, "", text)
            if not value:
                self.error(f"argument {flag}: got an empty text; expected a value")
            if value != value.encode(errors="ignore").decode():  # safetensors cannot open such a path
                self.error(f"argument {flag}: {value} is not UTF-8; choose another name")
        for flag in (flag for action in self._actions if action.nargs == "+" for flag in action.option_strings):
            if sum(text.split("=")[0] == flag for text in args) > 1:
                self.error(f"argument {flag}: expected it once, with all values, for example {flag} A B")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UserError(message)


def number(kind: type, interval: str) -> Callable[[str], float]:
    """Returns an argparse type for a number in an interval such as "[0, 1]" or "(0, inf)". NaN is rejected."""
    low, high = map(float, interval[1:-1].split(","))
    excluded = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "()"]

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value not in excluded:
                return value + 0  # turns -0.0 into 0.0
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} in {interval}, got {text}")

    return parse


COUNT, FRACTION = number(int, "[1, 1e9]"), number(float, "[0, 1]")
POSITIVE, NOT_NEGATIVE = number(float, "(0, inf)"), number(float, "[0, inf)")


def complete(args: argparse.Namespace) -> None:
    """Sets the defaults that depend on other flags, normalises the paths, and checks flags that depend on each other.

    Also checks that the local files of the task and the model exist.
    """
    if args.noise == "backtranslation" and not args.translators:
        args.translators = TRANSLATORS
    args.task = one_spelling(args.task, ("demo", *TASKS))
    args.model = one_spelling(args.model or ("demo" if args.task == "demo" else DEFAULT_MODEL), ("demo",))

    check_noise(args)
    if args.ce_temperature and any(args.lam):
        raise UserError(f"argument --ce-temperature: needs --lam 0, got --lam {' '.join(map(str, args.lam))}")
    num_classes = len(TASKS[args.task].labels) if args.task in TASKS else 2
    if args.shots and args.shots < num_classes:
        raise UserError(f"argument --shots: expected at least {num_classes}, one for each class, got {args.shots}")
    find_files(args.task, args.data_dir)
    check_model_folder(args.model, args.pooling == "cls" and not args.ce_temperature)


def one_spelling(path: str, reserved: tuple[str, ...]) -> str:
    """Returns the normalised path of a folder, for example "b" for "b/" and "./b", so that one folder has one name.

    Returns "./demo" unchanged, because "demo" without "./" means the built-in demo. If there is no folder b, returns
    "./b" unchanged, because "b" without "./" could mean a model on the hub.
    """
    if path in reserved or not os.path.isdir(path):
        return path
    normal = os.path.normpath(path)
    return f"./{normal}" if normal in reserved else normal


def check_noise(args: argparse.Namespace) -> None:
    if (args.noise is None) != (args.noise_level is None):
        raise UserError("argument --noise: needs --noise-level, and --noise-level needs --noise; for example --noise "
                        "label --noise-level 0.1 (a fraction) or --noise backtranslation --noise-level 0.7 "
                        "(a temperature)")
    if args.noise == "backtranslation" and args.noise_level == 0:
        raise UserError("argument --noise-level: expected a temperature above 0 for --noise backtranslation, got 0")
    if args.noise in ("label", "word") and args.noise_level > 1:
        raise UserError(f"argument --noise-level: expected a fraction for --noise {args.noise}, "
                        f"got {args.noise_level:g}")
    if args.translators and args.noise != "backtranslation":
        raise UserError("argument --translators: needs --noise backtranslation")


def check_model_folder(model: str, has_own_classifier: bool) -> None:
    """Checks the files of a local model. The weights must be safetensors files in the folder of the model."""
    folder = Path(model)
    is_hub_id = not folder.is_dir() and model.count("/") <= 1 and model[:1] not in ("", ".", "/", "~")
    if model == "demo" or is_hub_id:
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"argument --model: {model} has no config.json; expected a hub id or a save_pretrained folder")
    if has_own_classifier and (folder / "head.safetensors").is_file():
        raise UserError(f"argument --model: {model} was trained with --pooling mean or --ce-temperature; add that flag")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with explain_errors("--model", index, "the index that save_pretrained writes"):
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if strange := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise UserError(f"argument --model: {index} names {one_line(strange[0], 60)}; expected a .safetensors file "
                            "in the same folder")
