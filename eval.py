"""What finetune.py wrote: tabulated, drawn and scored.

    python eval.py table runs/results.jsonl [...]            # markdown: all seeds, paired differences, their mean
    python eval.py effects results/*.jsonl -o FIG.png        # every paired difference CE + SCL minus CE, in one picture
    python eval.py grid runs/results.jsonl -o FIG.png        # validation accuracy over lam x tau
    python eval.py score runs/RUN [RUN ...] [--task T]       # metrics on the test set, geometry of the features
    python eval.py tsne runs/RUN_CE runs/RUN_SCL -o FIG.png  # Figures 2 and 3 of the paper
    python eval.py predict runs/RUN [FILE]                   # a text a line -> its class and probability
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.special import softmax, stdtrit

from data import TASKS, Mistake, Split, blame, load_data, method_name, printable, read_records, read_text


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Mistake(message)  # argparse would print the usage first


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    records, picture, device, runs, texts = (Parser(add_help=False) for _ in range(5))
    records.add_argument("files", nargs="+", metavar="RESULTS.jsonl", help="or a folder that holds it")
    picture.add_argument("-o", "--output", required=True, metavar="FIG.png")
    device.add_argument("--device", help="cpu, cuda, mps (default: the fastest there is)")
    runs.add_argument("runs", nargs="+", metavar="RUN", help="checkpoint folder")
    runs.add_argument("--task", help="another task than the run's own")
    runs.add_argument("--data-dir", help="where its GLUE files are (default: as the run had it)")
    texts.add_argument("run", metavar="RUN", help="checkpoint folder")
    texts.add_argument("file", nargs="?", default="/dev/stdin", metavar="FILE",
                       help="a text a line, or two with a tab between (default: standard input)")

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, parents in (
        ("table", table, [records]),
        ("effects", effects, [records, picture]),
        ("grid", grid, [records, picture]),
        ("score", score, [runs, device]),
        ("tsne", tsne, [runs, device, picture]),
        ("predict", predict, [texts, device]),
    ):
        commands.add_parser(name, parents=parents).set_defaults(command=command)

    args = parser.parse_args(argv)
    if "output" in args:
        output = Path(args.output)
        if not os.path.isdir(output.parent):  # False for a name that is too long
            raise Mistake(f"argument -o: no folder {output.parent}; make it or choose another")
        if not output.suffix:
            raise Mistake(f"argument -o: {output} has no ending; expected one such as .png or .pdf")
    return args


# ------------------------------------------------------------ records: what they hold, and which belong together

KINDS = {
    "text": lambda value: isinstance(value, str),
    "two texts": lambda value: isinstance(value, list) and [type(item) for item in value] == [str, str],
    "count": lambda value: type(value) is int and 1 <= value < 2**53,
    "number": lambda value: type(value) in (int, float) and 0 <= value < 1e15,
    "fraction": lambda value: type(value) in (int, float) and 0 <= value <= 1,
}
NOISE = {"noise": "text or null", "noise_level": "number or null", "translators": "two texts or null"}
SETTING = {"task": "text", "shots": "count or null", "shots_per_class": "count or null", "model": "text",
           "pooling": "text", **NOISE, "batch_size": "count", "sampler": "text", "precision": "text",
           "dropout": "fraction", "max_length": "count", "weight_decay": "number", "warmup_ratio": "fraction"}
TUNED = {"lr": "number", "head_lr": "number", "steps": "count", "eval_every": "count"}  # a method's, not a setting's
COMPARED = [name for name in (*SETTING, *TUNED) if name not in ("task", "shots", "shots_per_class")]
METHOD = {"lam": "fraction", "tau": "number or null", "ce_temperature": "number or null"}
CHECKPOINT = {"run": "text", **SETTING, **TUNED, **METHOD, "seed": "number", "data_dir": "text or null",
              "test_checksum": "text"}
MADE_WITH = {"device": "text", "python": "text", "torch": "text", "transformers": "text", "commit": "text or null"}
FIELDS = {**CHECKPOINT, "train_checksum": "text", "validation_checksum": "text", "test_size": "count",
          "validation_accuracy": "fraction", "test_accuracy": "fraction", "seconds": "number", **MADE_WITH}
Arm = dict[int, dict]  # records of one setting and method, by seed
CE, CE_SCL = (0, None, None), (0.9, 0.3, None)  # by METHOD

# Test accuracy in the paper, of CE and of CE + SCL with the best of 24 (lam, tau): by task, shots and the temperature
# of back-translation from Tables 2 and 3, all of train from Table 5, and transfer from SST-2 to 20 examples a class.
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
}  # fmt: skip


def checked(record: dict, fields: dict[str, str], where: str) -> dict:
    """The record with its texts printable, if these fields hold what finetune.py writes there."""
    for name, expected in fields.items():
        value, (kind, _, null) = record.get(name), expected.partition(" or ")
        if name not in record:
            raise Mistake(f"{where} is no record of a run: it has no {name}")
        if not KINDS[kind](value) and not (null and value is None):
            came = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else printable(repr(value))
            raise Mistake(f"{where} is no record of a run: {name} is {came}, expected {expected}")
    if (record["lam"] == 0) != (record["tau"] is None) or (record["noise"] is None) != (record["noise_level"] is None):
        raise Mistake(f"{where} is no record of a run: lam comes with tau, and noise with noise_level")
    return record | {name: printable(record[name], 1000) for name in fields if isinstance(record[name], str)}


def read_arms(files: list[str]) -> dict[tuple, dict[tuple, Arm]]:
    """setting -> METHOD -> seed -> record; refuses what must not be averaged."""
    settings: dict[tuple, dict[tuple, Arm]] = {}
    firsts: dict[tuple, dict] = {}
    for file in files:
        file = os.path.join(file, "results.jsonl") if os.path.isdir(file) else file
        if not os.path.isfile(file):
            raise Mistake(f"argument RESULTS.jsonl: no file {file}; finetune.py writes OUT/results.jsonl")

        for record in read_records(Path(file)):
            record = checked(record, FIELDS, f"argument RESULTS.jsonl: {file}, run {record['run'][:100]}")
            # CE and CE + SCL each go on from a checkpoint of their own.
            model = record["model"].rstrip("/")
            base = re.sub(r"-lam[\d.e-]+(-tau[\d.e+-]+)?-seed\d+-\w+$", "", model)
            record |= {"model": base, "is_transfer": base != model, "file": file}

            setting = tuple(str(record[name] or "") for name in SETTING)
            method = tuple(record[name] for name in METHOD)
            arm = settings.setdefault(setting, {}).setdefault(method, {})
            refuse_mixture(record, firsts.setdefault(setting, record), ("test_checksum", "test_size"))
            refuse_mixture(record, next(iter(arm.values()), record), TUNED)
            other = arm.setdefault(record["seed"], record)
            if any(other[name] != record[name] for name in ("run", "test_accuracy")):  # one run may be in two files
                raise Mistake(f"argument RESULTS.jsonl: {describe(record)} has seed {record['seed']} twice, "
                              f"{other['run']} (in {other['file']}) and {record['run']} (in {file}); keep one")

    if not settings:
        raise Mistake(f"argument RESULTS.jsonl: no record in {', '.join(files)}")
    return settings


def refuse_mixture(record: dict, other: dict, names: Iterable[str]) -> None:
    for name in names:
        if str(record[name]) != str(other[name]):
            files = " ".join(dict.fromkeys((other["file"], record["file"])))
            line = json.dumps({name: record[name]})[1:-1]
            raise Mistake(f"argument RESULTS.jsonl: {describe(record)} mixes {name} {other[name]} and {record[name]}, "
                          f"in {files}; give each an --out of its own, or pick one: "
                          f"grep -hF '{line},' {files} > one.jsonl")


def describe(record: dict) -> str:
    return f"{record['task']}, N = {shots(record)}, {method_name(record)}"


def shots(record: dict) -> str:
    return f"{record['shots_per_class']} a class" if record["shots_per_class"] else str(record["shots"] or "all")


def shown(record: dict) -> dict:
    """As tables and titles say it: folders by their last name, no head_lr and eval_every that follow from the rest."""
    folders = {field: Path(record[field]).name or record[field] for field in ("task", "model")}
    folders = {field: name for field, name in folders.items() if name not in TASKS}  # my/sst2 is not the paper's
    usual = {"head_lr": record["lr"], "eval_every": math.ceil(record["steps"] / 10)}
    derived = {name: None for name, value in usual.items() if record[name] == value}
    translators = record["translators"] and " ".join(map(printable, record["translators"]))
    return record | folders | derived | {"translators": translators}


def paper_gain(record: dict) -> float | None:
    """CE + SCL minus CE in the paper, in points, where it has this method and setting; its transfer is from SST-2."""
    is_its_method = tuple(record[name] for name in METHOD) == CE_SCL
    from_sst2 = record["is_transfer"] and Path(record["model"]).name.startswith("sst2-")
    is_like_it = record["batch_size"] == 16 and record["noise"] in (None, "backtranslation")
    if not is_its_method or not is_like_it or from_sst2 != bool(record["shots_per_class"]):
        return None
    ce, ce_scl = PAPER.get((record["task"], shots(record), record["noise_level"]), (None, None))
    return ce and ce_scl - ce


# ------------------------------------------------------------ statistics


def values(arm: Arm, name: str) -> np.ndarray:
    return np.array([record[name] for record in arm.values()])


def top_three(arm: Arm) -> tuple[float, float]:
    """The paper's protocol: mean and std of the test accuracy of the best three by validation.

    Where more tie at the cut than fit, k of them at random: the expected mean, and the root of the expected variance.
    """
    validation, test = values(arm, "validation_accuracy"), values(arm, "test_accuracy")
    cut = np.sort(validation)[-3]
    above, tied = test[validation > cut], test[validation == cut]
    k, n = 3 - len(above), len(tied)
    total = above.sum() + k * tied.mean()
    total_variance = k * (n - k) / max(n - 1, 1) * tied.var()  # of a draw without replacement
    squares = (above**2).sum() + k * (tied**2).mean()
    variance = (squares - (total**2 + total_variance) / 3) / 2
    return total / 3, max(variance, 0) ** 0.5


def paired_differences(arm: Arm, other: Arm, *splits: str, measure: str = "test_accuracy") -> dict[int, float]:
    """arm minus other, by every seed that both have; these splits must be the same."""
    seeds = [seed for seed in sorted(arm) if seed in other]
    for seed, split in itertools.product(seeds, splits):
        if other[seed][f"{split}_checksum"] != arm[seed][f"{split}_checksum"]:
            both = f"{method_name(other[seed])} and {method_name(arm[seed])}"
            raise Mistake(f"argument RESULTS.jsonl: {both} saw different {split} sets at seed {seed}: "
                          f"{other[seed]['run']} and {arm[seed]['run']}")
    return {seed: arm[seed][measure] - other[seed][measure] for seed in seeds}


def t_interval(differences: dict[int, float]) -> tuple[float, float, float]:
    """The mean with its 95 % interval by Student's t; one pair has none (nan)."""
    numbers = np.array(list(differences.values()))
    n, mean = len(numbers), numbers.mean()
    half = stdtrit(n - 1, 0.975) * numbers.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return mean, mean - half, mean + half


def pooled(gains: list[tuple[str, dict[int, float]]]) -> tuple[float, float, float]:
    """The mean over settings, each a task and its differences by seed, with its 95 % t interval.

    A seed's 20 examples lie within its 100, so the settings of one task are not independent, but its seeds are. So the
    variance is that of seeds, each with all its settings at once. Of one setting this is `t_interval`. A task of fewer
    than five seeds leaves none (nan).
    """
    means = [np.mean(list(differences.values())) for _, differences in gains]
    variance, freedom = 0.0, 0
    for task in dict.fromkeys(task for task, _ in gains):
        pulls: dict[int, float] = Counter()  # what each seed adds to the sum of the task's means
        for (other, differences), mean in zip(gains, means, strict=True):
            if other == task:
                for seed, gain in differences.items():
                    pulls[seed] += (gain - mean) / len(differences)
        n = len(pulls)
        variance += n / (n - 1) * sum(pull**2 for pull in pulls.values()) if n >= 5 else np.nan
        freedom += n - 1
    half = stdtrit(freedom, 0.975) * variance**0.5 / len(gains)
    return np.mean(means), np.mean(means) - half, np.mean(means) + half


def test_set_error(arm: Arm, other: Arm) -> float | None:
    """Standard error of the mean paired difference over the test examples; None for records without the answers."""
    pairs = [(arm[seed], other[seed]) for seed in arm if seed in other]
    if any("test_correct" not in record for pair in pairs for record in pair):
        return None

    gains = np.mean([right_or_wrong(one) - right_or_wrong(two) for one, two in pairs], axis=0)  # (test examples,)
    return gains.std() / len(gains) ** 0.5


def right_or_wrong(record: dict) -> np.ndarray:
    """1 or 0, by test example."""
    with blame("RESULTS.jsonl", f"test_correct of {record['run']}", "a bit for each test example, in hexadecimal"):
        packed = np.frombuffer(bytes.fromhex(record["test_correct"]), np.uint8)
        return np.unpackbits(packed)[: record["test_size"]].reshape(record["test_size"]).astype(int)


# ------------------------------------------------------------ table

EXPLAINED = {
    "all seeds": "test accuracy in %, mean ± sample std (ddof = 1) over n seeds",
    "top 3 by validation": "the same of the best three of all seeds by validation, the paper's protocol",
    "minus CE [95 %]": "mean paired difference over seeds, Student's t interval, not corrected for several rows",
    "paper's gain": "its CE + SCL, the best of 24 (lam, tau), minus its CE, with RoBERTa-Large",
    "its test s.e.": "standard error of minus CE over the test examples: what other test sentences would change",
    "on validation [95 %]": "the same difference on the validation examples, which also chose the checkpoint",
    "minus clean [95 %]": "the same method's mean paired difference to no noise",
    "test s.e.": "binomial standard error of the accuracy, for the size of the test set",
    "mean over settings": "95 % t interval, the seeds of a task with all their settings as its independent parts",
}


def percent(mean: float, std: float | None = None) -> str:
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"


def spread(numbers: np.ndarray, digits: int) -> str:
    """Mean ± sample std; one number has none."""
    mean = f"{np.mean(numbers):.{digits}f}"
    return f"{mean} ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else mean


def difference(mean: float, low: float, high: float) -> str:
    if np.isnan(low):
        return f"{100 * mean:+.1f} (too few seeds)"
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def print_table(header: list[str], rows: list[list]) -> None:
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join("" if cell is None else str(cell).replace("|", "\\|") for cell in cells) + " |")


def table_row(arm: Arm, ce: Arm, clean: Arm) -> dict:
    """The columns of a setting and a method, beside CE and beside the same method without noise, where they are."""
    record, n, test = shown(next(iter(arm.values()))), len(arm), values(arm, "test_accuracy")
    gained = paired_differences(arm, ce, "train", "validation", "test")
    on_validation = paired_differences(arm, ce, measure="validation_accuracy")
    lost = paired_differences(arm, clean, "validation", "test")
    papers = paper_gain(record) if ce else None
    error = test_set_error(arm, ce) if gained else None

    return {
        "task": record["task"],
        "shots": shots(record),
        **{name: record[name] for name in COMPARED},
        "method": method_name(record),
        "n": n,
        "all seeds": spread(100 * test, 1),
        "top 3 by validation": percent(*top_three(arm)) if n >= 10 else None,
        "minus CE [95 %]": difference(*t_interval(gained)) if gained else None,
        "its test s.e.": None if error is None else percent(error),
        "paper's gain": None if papers is None else f"{papers:+.1f}",
        "on validation [95 %]": difference(*t_interval(on_validation)) if gained else None,
        "minus clean [95 %]": difference(*t_interval(lost)) if lost else None,
        "test s.e.": percent((test.mean() * (1 - test.mean()) / record["test_size"]) ** 0.5),
        "note": f"{len(gained)} pairs" if ce and len(gained) < max(n, len(ce)) else None,
        "seeds": ", ".join(f"{seed}: {percent(arm[seed]['test_accuracy'])}" for seed in sorted(arm)),
    }


def table(args: argparse.Namespace) -> None:
    settings, rows, gains, records = read_arms(args.files), [], dict[str, list](), []
    for setting, arms in settings.items():
        without_noise = tuple("" if name in NOISE else value for name, value in zip(SETTING, setting, strict=True))
        clean = settings.get(without_noise, {}) if without_noise != setting else {}
        for key in sorted(arms, key=lambda key: tuple(value or 0 for value in key)):
            ce = arms.get(CE, {}) if key != CE else {}
            rows.append(table_row(arms[key], ce, clean.get(key, {})))
            records += arms[key].values()
            if gained := paired_differences(arms[key], ce):
                gains.setdefault(rows[-1]["method"], []).append((setting[0], gained))

    shared = {name: rows[0][name] for name in COMPARED if len({row[name] for row in rows}) == 1}
    columns = [name for name in rows[0] if name not in shared and any(row[name] is not None for row in rows)]
    columns.remove("seeds")
    print(", ".join(f"{name} {value}" for name, value in shared.items() if value is not None) + "\n")
    print_table(columns, [[row[name] for name in columns] for row in rows])

    several = {method: of_method for method, of_method in gains.items() if len(of_method) > 1}
    for method, of_method in several.items():
        print(f"\n{pooled_line(method, of_method)}")
    print()
    for name in [*columns, "mean over settings"] if several else columns:
        if name in EXPLAINED:
            print(f"{name}: {EXPLAINED[name]}.")

    seconds = [record["seconds"] for record in records]
    made_with = [f"{name} {', '.join(sorted({str(record[name]) for record in records}))}" for name in MADE_WITH]
    print(f"\n{len(records)} runs of {min(seconds):.0f} to {max(seconds):.0f} s, {sum(seconds) / 3600:.1f} h in all; "
          f"{'; '.join(made_with)}.\n\nEvery seed:\n")
    for row in rows:
        cells = [row[name] for name in columns[: columns.index("method") + 1]]
        print(f"- {', '.join(str(cell) for cell in cells if cell is not None)}: {row['seeds']}")


def pooled_line(method: str, gains: list[tuple[str, dict[int, float]]]) -> str:
    """What a table says of a method in all its settings together."""
    settings = [list(differences.values()) for _, differences in gains]
    pairs, n = np.concatenate(settings), len(settings)
    ahead = sum(np.mean(of_setting) > 0 for of_setting in settings)
    return (f"{method} minus CE, mean over {n} settings: {difference(*pooled(gains))}; "
            f"ahead in {ahead} of {n} settings and {(pairs > 0).sum()} of {len(pairs)} pairs.")


# ------------------------------------------------------------ pictures of records: effects, grid


def save(figure, output: str, width: float, height: float) -> None:
    """In these inches, unless they are many; a dollar sign in a text makes no formula of it."""
    from matplotlib.text import Text

    figure.set_size_inches(min(width, 20), min(height, 40))
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    try:
        figure.savefig(output, dpi=150, bbox_inches="tight")
    except ValueError as error:  # no such format
        raise Mistake(f"argument -o: {output} cannot be written: {error}") from None
    print(f"picture in {printable(output, 200)}")


def read_effects(files: list[str]) -> dict[tuple, list[tuple[dict, dict[int, float]]]]:
    """Group -> (setting, CE + SCL (0.9, 0.3) minus CE by seed) for each of its rows, by task.

    Each file is read by itself, since CE may have another length in another; what two files share counts once.
    """
    effects: dict[tuple, tuple[dict, dict[int, float]]] = {}
    for file in files:
        for setting, arms in read_arms([file]).items():
            both = arms.get(CE_SCL, {}), arms.get(CE, {})
            if differences := paired_differences(*both, "train", "validation", "test"):
                scl, ce = (shown(next(iter(arm.values()))) for arm in both)
                tuned = {name: " / ".join(dict.fromkeys((str(ce[name]), str(scl[name])))) for name in TUNED}
                key = (*setting, *tuned.values(), ce["test_checksum"])
                effects.setdefault(key, (scl | tuned, {}))[1].update(differences)
    if not effects:
        raise Mistake("argument RESULTS.jsonl: no seed has both --lam 0 and --lam 0.9 --tau 0.3")

    groups: dict[tuple, list] = {}  # by shots, then noise, then transfer; each model apart
    for setting, differences in sorted(effects.values(), key=lambda effect: effect[0]["task"]):
        kind = "noise" if setting["noise"] else "transfer" if setting["is_transfer"] else ""
        number = 0 if kind else setting["shots"] or setting["shots_per_class"] or math.inf
        title = kind or (f"N = {shots(setting)}" if number < math.inf else "all of train")
        groups.setdefault((kind, number, f"{title}: {setting['model']}"), []).append((setting, differences))
    return dict(sorted(groups.items()))


def label_of(setting: dict, group: list[tuple[dict, dict]]) -> str:
    """The task, noise, what is not as in most of the group; and rates and lengths, CE's / CE + SCL's, that differ."""
    told = [setting["task"]]
    if setting["noise"]:
        told.append(f"{setting['noise']} {setting['noise_level']:g}")
    for name in (*SETTING, *TUNED):
        found = Counter(str(other[name]) for other, _ in group)
        is_usual = str(setting[name]) == found.most_common(1)[0][0]
        if name in ("task", *NOISE) or setting[name] in (None, "None"):
            continue
        if len(found) > 1 and (name in TUNED or not is_usual):
            told.append(f"{name} {setting[name]}")
    return ", ".join(told)


def effects(args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    panel, labels, titles = figure.subplots(), [], []
    for (*_, title), group in read_effects(args.files).items():
        titles.append(len(labels))
        labels.append(title)
        for setting, by_seed in group:
            draw_effect(panel, len(labels), by_seed, t_interval(by_seed), paper_gain(setting))
            labels.append(label_of(setting, group))
        if len(group) > 1:
            interval = pooled([(setting["task"], by_seed) for setting, by_seed in group])
            draw_effect(panel, len(labels), {}, interval, None)
            labels.append(f"mean of these {len(group)}")

    marks = {line.get_label(): line for line in panel.lines if line.get_marker() != "None"}
    reach = 1.1 * max(1, np.nanmax([np.abs(line.get_xdata()).max() for line in panel.lines]))
    panel.axvline(0, color="black", linewidth=0.8)
    panel.grid(axis="x", alpha=0.3)
    panel.tick_params(axis="y", length=0)
    panel.set(xlim=(-reach, reach), ylim=(len(labels) - 0.4, -0.6), yticks=range(len(labels)), yticklabels=labels,
              xlabel="difference in test accuracy, points", title="CE + SCL (0.9, 0.3) minus CE, paired by seed")
    for y in titles:
        panel.get_yticklabels()[y].set_weight("bold")
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=2, fontsize=9)
    save(figure, args.output, 9, 1.5 + 0.24 * len(labels))


def draw_effect(panel, y: int, by_seed: dict[int, float], interval: tuple[float, ...], paper: float | None) -> None:
    """One row, in points: of a setting, or of a group, which has no seeds of its own."""
    mean, low, high = (100 * part for part in interval)
    shape, colour, label = "D", "black", "mean of the group, 95 % interval"
    if by_seed:
        shape, colour, label = "s", "#0072B2", "mean of the seeds, 95 % interval"
        dots = [100 * gain for gain in by_seed.values()]
        panel.plot(dots, [y + 0.3] * len(dots), "o", color="grey", markersize=2.5, label="a seed")
    panel.plot([low, high], [y, y], color=colour, linewidth=1.6)
    panel.plot([mean], [y], shape, color=colour, label=label)
    if paper is not None:
        panel.plot([paper], [y], "x", color="#D55E00", mew=1.8, zorder=3, label="the paper's, RoBERTa-Large")
    panel.text(1.015, y, difference(*interval), transform=panel.get_yaxis_transform(), va="center", fontsize=9)


def grid(args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    cells, ce = read_grid(args.files)
    accuracies = {cell: 100 * values(arm, "validation_accuracy") for cell, arm in cells.items()}
    lams, taus = (sorted(set(of_cells)) for of_cells in zip(*cells, strict=True))
    means = np.full((len(lams), len(taus)), np.nan)
    for (lam, tau), of_cell in accuracies.items():
        means[lams.index(lam), taus.index(tau)] = of_cell.mean()
    centre = 100 * values(ce, "validation_accuracy").mean() if ce else np.nanmean(means)
    reach = max(2, np.nanmax(np.abs(means - centre)))  # half a point is no full scale of colours

    figure = Figure(layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(means - centre, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    figure.colorbar(image, label=f"points above {'CE' if ce else 'the mean of all cells'}, {centre:.1f}")
    for (lam, tau), of_cell in accuracies.items():
        colour = "white" if abs(of_cell.mean() - centre) > 0.7 * reach else "black"
        panel.text(taus.index(tau), lams.index(lam), spread(of_cell, 1), ha="center", va="center", color=colour)
    panel.set(xticks=range(len(taus)), xticklabels=taus, yticks=range(len(lams)), yticklabels=lams,
              xlabel="temperature tau", ylabel="SCL weight lam")
    arm = next(iter(cells.values()))
    record = shown(next(iter(arm.values())))
    panel.set_title(f"{record['task'][:40]}, N = {shots(record)}: validation accuracy (%)\n"
                    f"mean ± sample std, n = {len(arm)}", fontsize=10)
    save(figure, args.output, 2.6 + 1.1 * len(taus), 1.8 + 0.55 * len(lams))


def read_grid(files: list[str]) -> tuple[dict[tuple, Arm], Arm]:
    """(lam, tau) -> seed -> record, all of one setting, rate, length and set of seeds; and CE of these."""
    settings = read_arms(files)
    first, *others = (next(iter(arm.values())) for arms in settings.values() for arm in arms.values())
    for other in others:
        refuse_mixture(other, first, SETTING)

    (arms,) = settings.values()
    cells = {(lam, tau): arm for (lam, tau, _), arm in arms.items() if lam}
    if not cells:
        raise Mistake("argument RESULTS.jsonl: no run with --lam above 0 to draw")

    first, *_ = (record for arm in cells.values() for record in arm.values())
    seeds = set().union(*cells.values())
    for arm in cells.values():
        record = next(iter(arm.values()))
        refuse_mixture(record, first, ("lr", "steps"))
        if missing := seeds - set(arm):
            raise Mistake(f"argument RESULTS.jsonl: {describe(record)} lacks seed {', '.join(map(str, missing))}, "
                          "which another cell has; run what is missing")

    ce = arms.get(CE, {})
    return cells, {seed: ce[seed] for seed in seeds} if seeds <= set(ce) else {}


# ------------------------------------------------------------ checkpoints: score, tsne, predict


def read_checkpoint(folder: str) -> dict:
    """The record in it."""
    file = Path(folder, "record.json")
    if not os.path.isfile(file):
        raise Mistake(f"argument RUN: {folder} is no checkpoint of finetune.py (no record.json); a sweep keeps "
                      "its own with --save")
    with blame("RUN", file, "the record that finetune.py wrote"):
        record = dict(json.loads(file.read_text(encoding="utf-8")))
    return checked(record, CHECKPOINT, f"argument RUN: {file}")


def answer(folder: str, record: dict, names: tuple[str, ...] | None, split: Split, device: str | None):
    """Class names, class logits (N, C) and features (N, D); names None, or numbers, are the checkpoint's own."""
    import transformers

    from finetune import check_vocabulary, load_config, load_model, load_tokenizer, pick_device, predict

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(folder, record["pooling"])
    if names:  # a test set; a line to predict may be of signs that no tokenizer knows
        check_vocabulary(tokenizer, split.texts, folder)
    own = tuple(map(str, load_config(folder).id2label.values()))
    if names is None or names == tuple(map(str, range(len(own)))):
        names = own

    model = load_model(folder, record["pooling"], names, tokenizer, 0.0, record["ce_temperature"], record["max_length"])
    if model.classifier_is_new:
        raise Mistake(f"argument RUN: {folder} has no trained classifier for {', '.join(names)}; its config has "
                      f"{', '.join(own)}")
    model.to(pick_device(device, record["precision"]))
    return names, *predict(model, split, record["precision"])


def test_set(folder: str, args: argparse.Namespace):
    """A run's record; class names, labels, class logits and features of its test set, or of another task's."""
    record = read_checkpoint(folder)
    task = args.task or record["task"]
    data_dir = args.data_dir or (record["data_dir"] if task in TASKS else None)
    data = load_data(task, data_dir, bool(record["shots"] or record["shots_per_class"]))
    is_its_own = data.test.checksum == record["test_checksum"]
    if args.task is None and not is_its_own:
        raise Mistake(f"argument RUN: {folder} was tested on other data than {task} has now; give --task or --data-dir")
    names, class_logits, features = answer(folder, record, data.label_names, data.test, args.device)
    accuracy, recorded = np.mean(class_logits.argmax(axis=1) == data.test.labels), record.get("test_accuracy")
    if is_its_own and isinstance(recorded, float) and abs(accuracy - recorded) > 1e-9:
        print(f"{printable(folder, 200)}: accuracy {accuracy:.4f}, where its record has {recorded:.4f}: another device "
              "or library, or not the weights of that run", file=sys.stderr)
    return shown(record | {"task": task}), tuple(map(printable, names)), data.test.labels, class_logits, features


def test_sets(args: argparse.Namespace) -> tuple[list[tuple], list[str]]:
    """Of every folder; and the settings that are not the same in all of them."""
    tests = [test_set(folder, args) for folder in args.runs]
    names = [*COMPARED, "ce_temperature"]
    return tests, [name for name in names if len({str(record[name]) for record, *_ in tests}) > 1]


def cosines(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean cosine over pairs of one class, and over pairs of two classes.

    Without N x N: |sum of z|^2 is the sum of all cosines, those of each example with itself, which are 1, among them.
    """
    z = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    sizes = np.unique(labels, return_counts=True)[1]
    sums = np.stack([z[labels == label].sum(axis=0) for label in np.unique(labels)])  # (C, D)
    within, everything = (sums**2).sum(), (sums.sum(axis=0) ** 2).sum()
    same_pairs = (sizes**2).sum()
    intra = (within - len(z)) / (same_pairs - len(z)) if same_pairs > len(z) else np.nan
    inter = (everything - within) / (len(z) ** 2 - same_pairs) if len(sizes) > 1 else np.nan
    return float(intra), float(inter)


def measure(labels: np.ndarray, predicted: np.ndarray, features: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef, silhouette_score

    within, between = cosines(features, labels)
    classes = len(set(labels))
    return {
        "accuracy": np.mean(labels == predicted),
        "macro-F1": f1_score(labels, predicted, average="macro"),
        "MCC": matthews_corrcoef(labels, predicted) if classes > 1 else np.nan,
        "cosine within a class": within,
        "between classes": between,
        "silhouette": silhouette_score(features, labels, metric="cosine") if 1 < classes < len(labels) else np.nan,
    }


def score(args: argparse.Namespace) -> None:
    from sklearn.metrics import confusion_matrix

    tests, differing = test_sets(args)
    rows, arms = [], dict[tuple, list]()
    for record, _, labels, class_logits, features in tests:
        told = [record[name] for name in differing]
        measures = measure(labels, class_logits.argmax(axis=1), features)
        shares = [np.bincount(labels).max() / len(labels), *measures.values()]
        rows.append([record["run"], record["task"], *told, len(labels), *(f"{share:.4f}" for share in shares)])
        arms.setdefault((re.sub(r"-seed\d+-\w+$", "", record["run"]), *told), []).append(measures.values())
    print_table(["run", "task", *differing, "test examples", "largest class", *measures], rows)

    if len(arms) < len(rows):
        print("\nMean ± sample std over the seeds:\n")
        cells = [[*arm, len(of_arm), *(spread(column, 3) for column in zip(*of_arm, strict=True))]
                 for arm, of_arm in arms.items()]
        print_table(["runs", *differing, "n", *measures], cells)

    for record, names, labels, class_logits, _ in tests:
        print(f"\n{record['run']}\n")
        counts = confusion_matrix(labels, class_logits.argmax(axis=1), labels=range(len(names)))
        print_table(["true \\ predicted", *names], [[name, *line] for name, line in zip(names, counts, strict=True)])


COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "o^sDvP"  # Okabe and Ito


def tsne(args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    tests, differing = test_sets(args)
    points = [project(features, folder) for folder, (*_, features) in zip(args.runs, tests, strict=True)]
    reach = 1.05 * max(np.abs(of_panel).max() for of_panel in points)
    columns = len(tests) if len(tests) <= 3 else 2  # more than three: in pairs, such as CE beside CE + SCL
    rows = math.ceil(len(tests) / columns)

    figure = Figure(layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(tests) :]:
        panel.set_axis_off()
    for panel, of_panel, (record, names, labels, class_logits, _) in zip(axes.flat, points, tests, strict=False):
        for number in range(len(names)):
            panel.scatter(*of_panel[labels == number].T, s=18, alpha=0.7, linewidths=0,
                          color=COLOURS[number % 6], marker=MARKERS[(number + number // 6) % 6])
        accuracy = np.mean(labels == class_logits.argmax(axis=1))
        told = [f"{name} {record[name]}" for name in differing if record[name] is not None]
        title = textwrap.fill(", ".join([describe(record), f"seed {record['seed']}", *told]), 50)
        panel.set_title(f"{title}\ntest accuracy {100 * accuracy:.1f} %", fontsize=10)
        panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", anchor="N", xlabel="t-SNE 1",
                  ylabel="t-SNE 2")
        if panel is axes.flat[0] or names != tests[0][1]:
            legend = panel.legend(panel.collections, range(len(names)), ncols=2, fontsize=8,
                                  loc="upper center", bbox_to_anchor=(0.5, -0.15))
            for text, name in zip(legend.get_texts(), names, strict=True):
                text.set_text(printable(name, 24))  # set last: matplotlib hides a label that begins with an underscore

    most = max(len(names) for _, names, *_ in tests)
    save(figure, args.output, 4.5 * columns, rows * (4.8 + 0.1 * most))


def project(features: np.ndarray, folder: str) -> np.ndarray:
    """t-SNE by cosines: (N, 2). Of directions that are all the same it would crash."""
    from sklearn.manifold import TSNE

    z = features / np.maximum(np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True), 1e-300)
    if len(z) < 4 or np.ptp(z, axis=0).max() < 1e-6:
        raise Mistake(f"argument RUN: {folder}: t-SNE needs at least four test examples, and features that differ")
    with blame("RUN", folder, "features that t-SNE can draw"):
        return TSNE(metric="cosine", init="pca", perplexity=min(30, (len(z) - 1) / 3), random_state=0).fit_transform(z)


def predict(args: argparse.Namespace) -> None:
    record = read_checkpoint(args.run)
    with blame("FILE", args.file, "a text a line, in UTF-8"):
        lines = read_text(Path(args.file)).removesuffix("\n").split("\n")
    if lines == [""]:
        raise Mistake(f"argument FILE: {args.file} is empty; expected a text a line")
    rows = [tuple(line.removesuffix("\r").split("\t")) for line in lines]
    expected = record.get("num_texts", len(rows[0]))  # older records do not have it
    for number, row in enumerate(rows, start=1):
        if len(row) != expected:
            raise Mistake(f"argument FILE: {args.file}, line {number}: expected {expected} text(s), with a tab between "
                          f"two, got {len(row)}")

    split = Split(rows, np.zeros(len(rows), dtype=int))
    names, class_logits, _ = answer(args.run, record, None, split, args.device)
    for probabilities in softmax(class_logits, axis=1):
        best = probabilities.argmax()
        print(f"{printable(names[best])}\t{probabilities[best]:.4f}")


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        args.command(args)
    except (Mistake, OSError) as error:
        print(f"eval.py: error: {printable(error, 600)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # of letters that it cannot show
    sys.exit(main())
