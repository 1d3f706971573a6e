"""What finetune.py wrote, scored, drawn and tabulated.

    python eval.py score runs/RUN [RUN ...] [--task T]      # metrics on the test set, geometry of the features
    python eval.py tsne runs/RUN_CE runs/RUN_SCL -o FIG.png # Figures 2 and 3 of the paper
    python eval.py grid runs/results.jsonl -o FIG.png       # validation accuracy over lam x tau
    python eval.py table runs/results.jsonl [...]           # markdown: paper's protocol, all seeds, paired difference
"""

import argparse
import itertools
import json
import math
import re
import signal
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="score | tsne | grid | table")
    score = commands.add_parser("score", help="accuracy, macro-F1, MCC, confusion; cosines and silhouette of features")
    tsne = commands.add_parser("tsne", help="t-SNE of the test features, a panel a run")
    for command in (score, tsne):
        command.add_argument("runs", nargs="+", metavar="RUN", help="checkpoint folder")
        command.add_argument("--task", help="another task than the run's own")
        command.add_argument("--data-dir", help="where its GLUE files are (default: as the run had it)")
        command.add_argument("--device", help="cpu, cuda, mps (default: the fastest there is)")
    grid = commands.add_parser("grid", help="heat map of mean validation accuracy over lam x tau")
    table = commands.add_parser("table", help="markdown, with the paired difference to CE per seed")
    for command in (grid, table):
        command.add_argument("files", nargs="+", metavar="RESULTS.jsonl")
    for command in (tsne, grid):
        command.add_argument("-o", "--output", required=True, metavar="FIG.png")
    args = parser.parse_args(argv)
    if (output := getattr(args, "output", None)) and not Path(output).absolute().parent.is_dir():
        parser.error(f"argument -o: no folder {Path(output).parent}; make it or choose another")
    return args


if __name__ == "__main__":
    parse_args()  # a mistake ends here, before torch is imported

import matplotlib
import numpy as np
import scipy.stats
import transformers
from sklearn.manifold import TSNE
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef, silhouette_score

from data import TASKS, Mistake, blame, load_data, method_name, read_records
from finetune import load_model, load_tokenizer, pick_device, predict

matplotlib.use("Agg")  # pictures go to files, with or without a screen
import matplotlib.pyplot as plt

COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "o^sDvP"  # Okabe and Ito

# ------------------------------------------------------------ checkpoints: score, tsne


def test_set(folder: str, task: str | None, data_dir: str | None, device: str | None):
    """A run's record; class names, labels, class logits and features of its test set, or of another task's."""
    file = Path(folder, "record.json")
    if not file.is_file():
        raise Mistake(f"{folder} is no checkpoint of finetune.py (no record.json); a sweep keeps its with --save")
    with blame("RUN", folder, "a checkpoint of finetune.py"):
        record = json.loads(file.read_text())
        few_shot = bool(record["shots"] or record["shots_per_class"])
    if data_dir is None and (task is None or task in TASKS):
        data_dir = record["data_dir"]
    data = load_data(task or record["task"], data_dir, few_shot)
    if task is None and data.test.checksum != record["test_checksum"]:
        raise Mistake(f"{folder} was tested on other data than {record['task']} holds now; give --task or --data-dir")
    tokenizer = load_tokenizer(folder, record["pooling"])
    names = tuple(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).id2label.values())
    numbers = tuple(map(str, range(len(names))))  # labels that are numbers are the checkpoint's own
    if set(names) != set(data.label_names) and data.label_names != numbers:
        own, other = ", ".join(names), ", ".join(data.label_names)
        raise Mistake(f"argument --task: {folder} knows the classes {own}, not {other}")
    wanted = names if data.label_names == numbers else data.label_names
    model = load_model(folder, record["pooling"], wanted, tokenizer, 0.0, record["ce_temperature"],
                       record["max_length"]).to(pick_device(device))
    class_logits, features = predict(model, data.test, record["precision"])
    return record, data.label_names, data.test.labels, class_logits, features


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


def score(args: argparse.Namespace) -> None:
    summary, details, arms = [], [], dict[tuple, list[dict]]()
    tests = [test_set(folder, args.task, args.data_dir, args.device) for folder in args.runs]
    differing = differences([record for record, *_ in tests])
    for record, names, labels, class_logits, features in tests:
        predicted, classes = class_logits.argmax(axis=1), len(set(labels))
        silhouette = silhouette_score(features, labels, metric="cosine") if 1 < classes < len(labels) else np.nan
        metrics = {
            "test examples": len(labels),
            "accuracy": accuracy_score(labels, predicted),
            "macro-F1": f1_score(labels, predicted, average="macro"),
            "MCC": matthews_corrcoef(labels, predicted),
            **dict(zip(("cosine within a class", "between classes"), cosines(features, labels), strict=True)),
            "silhouette": silhouette,
        }
        shown = without_derived(record)
        told = {name: shown[name] for name in differing}
        summary.append({"run": record["run"], "task": args.task or record["task"], **told, **metrics})
        arm = (re.sub(r"-seed\d+-\w+$", "", record["run"]), *map(str, told.values()))
        arms.setdefault(arm, []).append(summary[-1])
        details.append((names, confusion_matrix(labels, predicted, labels=range(len(names)))))  # (true, predicted)
    cells = [[f"{value:.4f}" if isinstance(value, float) else value for value in row.values()] for row in summary]
    print_table(list(summary[0]), cells)
    if len(arms) < len(summary):
        print("\nMean ± sample std over the seeds:\n")
        measures = list(metrics)[1:]
        cells = [[*arm, len(rows), *(spread([row[name] for row in rows]) for name in measures)]
                 for arm, rows in arms.items()]
        print_table(["runs", *differing, "n", *measures], cells)
    for row, (names, counts) in zip(summary, details, strict=True):
        print(f"\n{row['run']}\n")
        print_table(["true \\ predicted", *names], [[name, *line] for name, line in zip(names, counts, strict=True)])


def differences(records: list[dict]) -> list[str]:
    """The settings that are not the same in all of them, beside those in a run's name."""
    rows = [without_derived(record) for record in records]
    names = [name for name in (*SETTING, *TUNED, "ce_temperature") if name not in ("task", "shots", "shots_per_class")]
    return [name for name in names if len({str(row[name]) for row in rows}) > 1]


def without_derived(record: dict) -> dict:
    """The record, but head_lr and eval_every are None where they follow from lr and steps."""
    usual = {"head_lr": record["lr"], "eval_every": math.ceil(record["steps"] / 10)}
    return record | {name: None for name, value in usual.items() if record[name] == value}


def spread(numbers: list[float]) -> str:
    return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}" if len(numbers) > 1 else f"{numbers[0]:.3f}"


def print_table(header: list[str], rows: list[list]) -> None:
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")


def shots(record: dict) -> str:
    return f"{record['shots_per_class']} a class" if record["shots_per_class"] else str(record["shots"] or "all")


def tsne(args: argparse.Namespace) -> None:
    columns = len(args.runs) if len(args.runs) <= 3 else 2  # more than three: in pairs, such as CE beside CE + SCL
    rows = math.ceil(len(args.runs) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 4.8 * rows), squeeze=False)
    panels, reach = axes.flat[: len(args.runs)], 0.0
    for unused in axes.flat[len(args.runs) :]:
        unused.set_axis_off()
    tests = [test_set(folder, args.task, args.data_dir, args.device) for folder in args.runs]
    differing = [name for name in differences([record for record, *_ in tests]) if name not in TUNED]
    for panel, (record, names, labels, class_logits, features) in zip(panels, tests, strict=True):
        perplexity = min(30, (len(features) - 1) / 3)
        projection = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0)
        points = projection.fit_transform(features)  # (N, 2)
        reach = max(reach, 1.05 * np.abs(points).max())
        for label, name in enumerate(names):
            panel.scatter(*points[labels == label].T, s=18, alpha=0.7, linewidths=0, label=name,
                          color=COLOURS[label % len(COLOURS)], marker=MARKERS[label % len(MARKERS)])
        accuracy = accuracy_score(labels, class_logits.argmax(axis=1))
        setting = [args.task or record["task"], f"N = {shots(record)}", method_name(record)]
        setting += [f"{name} {record[name]}" for name in differing if record[name] is not None]
        panel.set_title(f"{', '.join(setting)}\ntest accuracy {100 * accuracy:.1f} %", fontsize=10)
    for panel in panels:
        panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="t-SNE 1", ylabel="t-SNE 2")
    panels[0].legend()
    save(figure, args.output)


def save(figure, output: str) -> None:
    figure.tight_layout()
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:  # no permission; no such format
        raise Mistake(f"argument -o: {output} cannot be written: {error}") from None
    print(f"picture in {output}")


# ------------------------------------------------------------ records: grid, table

NOISE = ("noise", "noise_level", "translators")
SETTING = ("task", "shots", "shots_per_class", "model", "pooling", *NOISE, "batch_size", "sampler", "precision",
           "dropout", "max_length", "weight_decay", "warmup_ratio")
TUNED = ("lr", "head_lr", "steps", "eval_every")  # may differ between CE and CE + SCL, never within one of them
MADE_WITH = ("device", "python", "torch", "transformers", "commit")
METHOD = ("lam", "tau", "ce_temperature")
FIELDS = ("run", *SETTING, *TUNED, *METHOD, "seed", "train_checksum", "validation_checksum", "test_checksum",
          "test_size", "validation_accuracy", "test_accuracy", "seconds", *MADE_WITH)
Arm = dict[int, dict]  # records of one setting and method, by seed

# Test accuracy of the paper, CE and CE + SCL with the best of 24 (lam, tau): by task, shots and back-translation's
# temperature from Tables 2 and 3, all of train from Table 5, and its transfer from SST-2 to 20 examples a class.
PAPER = {
    ("sst2", "20", None): ("85.9 ± 2.1", "88.1 ± 3.3"), ("sst2", "100", None): ("91.1 ± 1.3", "92.8 ± 1.3"),
    ("sst2", "1000", None): ("94.0 ± 0.6", "94.1 ± 0.5"), ("sst2", "all", None): ("96.0 ± 0.4", "96.3 ± 0.4"),
    ("qnli", "20", None): ("65.0 ± 2.0", "75.7 ± 4.8"), ("qnli", "100", None): ("81.9 ± 0.4", "82.5 ± 0.4"),
    ("qnli", "1000", None): ("89.2 ± 0.6", "89.8 ± 0.4"), ("qnli", "all", None): ("90.4 ± 0.8", "93.9 ± 0.7"),
    ("mnli", "20", None): ("39.3 ± 2.5", "42.7 ± 4.6"), ("mnli", "100", None): ("59.2 ± 2.1", "61.1 ± 3.0"),
    ("mnli", "1000", None): ("81.4 ± 0.2", "81.5 ± 0.2"), ("mnli", "all", None): ("88.4 ± 1.0", "88.6 ± 0.7"),
    ("cola", "all", None): ("86.0 ± 0.5", "86.1 ± 0.8"), ("mrpc", "all", None): ("86.4 ± 2.4", "89.5 ± 0.9"),
    ("rte", "all", None): ("85.5 ± 1.8", "85.7 ± 0.5"),
    ("sst2", "100", 0.3): ("92.0 ± 1.3", "92.6 ± 0.9"), ("sst2", "100", 0.5): ("91.4 ± 1.0", "91.5 ± 1.0"),
    ("sst2", "100", 0.7): ("91.7 ± 1.3", "91.2 ± 0.6"), ("sst2", "100", 0.9): ("90.0 ± 0.5", "91.5 ± 1.0"),
    ("qnli", "100", 0.3): ("81.1 ± 2.3", "82.7 ± 1.9"), ("qnli", "100", 0.5): ("80.0 ± 2.9", "81.9 ± 2.5"),
    ("qnli", "100", 0.7): ("78.9 ± 3.7", "81.3 ± 0.6"), ("qnli", "100", 0.9): ("75.9 ± 4.0", "80.1 ± 2.5"),
    ("mnli", "100", 0.3): ("54.0 ± 1.1", "61.2 ± 2.3"), ("mnli", "100", 0.5): ("55.3 ± 2.4", "62.1 ± 0.9"),
    ("mnli", "100", 0.7): ("54.6 ± 2.2", "62.3 ± 1.1"), ("mnli", "100", 0.9): ("47.0 ± 1.8", "53.0 ± 2.1"),
    ("amazon_polarity", "20 a class", None): ("87.4 ± 6.4", "90.3 ± 0.6"),
    ("yelp_polarity", "20 a class", None): ("90.8 ± 2.2", "91.2 ± 0.4"),
}  # fmt: skip
CE, CE_SCL = (0, None, None), (0.9, 0.3, None)  # by METHOD


def read_arms(files: list[str]) -> dict[tuple, dict[tuple, Arm]]:
    """setting -> METHOD -> seed -> record; refuses what must not be averaged."""
    settings: dict[tuple, dict[tuple, Arm]] = {}
    for file in files:
        if not Path(file).is_file():
            raise Mistake(f"argument RESULTS.jsonl: no file {file}; finetune.py writes OUT/results.jsonl")
        for record in read_records(Path(file)):
            if lacking := [name for name in FIELDS if name not in record]:
                raise Mistake(f"argument RESULTS.jsonl: {file} holds a line without {lacking[0]}: no record of a run")
            # CE and CE + SCL each go on from a checkpoint of their own.
            record["model"] = re.sub(r"-lam[\d.e-]+(-tau[\d.e+-]+)?-seed\d+-\w+$", "", record["model"])
            arms = settings.setdefault(tuple(str(record[name] or "") for name in SETTING), {})
            arm = arms.setdefault(tuple(record[name] for name in METHOD), {})
            where = f"{record['task']}, N = {shots(record)}, {method_name(record)}"
            if arm.get(record["seed"], {}).get("run") == record["run"]:
                continue  # one run in two files
            of_setting = next((other for filled in arms.values() for other in filled.values()), record)
            of_arm = next(iter(arm.values()), record)
            for name, other in [(name, of_arm) for name in TUNED] + [("test_checksum", of_setting)]:
                if record[name] != other[name]:
                    raise Mistake(f"argument RESULTS.jsonl: {where} mixes {name} {other[name]} and {record[name]}: "
                                  "keep them apart by --out")
            if record["seed"] in arm:
                raise Mistake(f"argument RESULTS.jsonl: seed {record['seed']} is there twice for {where}; keep one")
            arm[record["seed"]] = record
    if not settings:
        raise Mistake(f"argument RESULTS.jsonl: no record in {', '.join(files)}")
    return settings


def values(arm: Arm, name: str) -> np.ndarray:
    return np.array([record[name] for record in arm.values()])


def grid(args: argparse.Namespace) -> None:
    settings = read_arms(args.files)
    if len(settings) > 1:
        (one, _), (other, _), *_ = settings.items()
        name, *pair = next(row for row in zip(SETTING, one, other, strict=True) if row[1] != row[2])
        mixed = " and ".join(value or "none" for value in pair)
        raise Mistake(f"argument RESULTS.jsonl: a grid is of one setting, these mix {name} {mixed}")
    (arms,) = settings.values()
    baseline = arms.get(CE, {})
    arms = {(lam, tau): arm for (lam, tau, _), arm in arms.items() if lam}
    if not arms:
        raise Mistake("argument RESULTS.jsonl: no run with --lam above 0 to draw")
    baseline = {seed: record for seed, record in baseline.items() if any(seed in arm for arm in arms.values())}
    lams, taus = (sorted({key[i] for key in arms}) for i in (0, 1))
    means = np.array([[100 * values(arms[lam, tau], "validation_accuracy").mean() if (lam, tau) in arms else np.nan
                       for tau in taus] for lam in lams])  # (lam, tau)
    figure, panel = plt.subplots(figsize=(1.6 + 0.9 * len(taus), 1.8 + 0.55 * len(lams)))
    image = panel.imshow(means, cmap="cividis", aspect="auto", origin="lower")
    for (row, column), mean in np.ndenumerate(means):
        bright = mean > (np.nanmin(means) + np.nanmax(means)) / 2
        panel.text(column, row, f"{mean:.1f}" if mean == mean else "-", ha="center", va="center",
                   color="black" if bright else "white" if mean == mean else "black")
    panel.set(xticks=range(len(taus)), xticklabels=taus, yticks=range(len(lams)), yticklabels=lams,
              xlabel="temperature tau", ylabel="SCL weight lam")
    record = next(iter(next(iter(arms.values())).values()))
    counts = sorted({len(arm) for arm in arms.values()})
    ce = f"; CE {100 * values(baseline, 'validation_accuracy').mean():.1f}" if baseline else ""
    panel.set_title(f"{record['task']}, N = {shots(record)}: validation accuracy (%)\n"
                    f"mean of {' to '.join(map(str, {counts[0]: 0, counts[-1]: 0}))} seeds{ce}", fontsize=10)
    figure.colorbar(image)
    save(figure, args.output)


def percent(mean: float, std: float | None = None) -> str:
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"


def top_three(arm: Arm) -> tuple[float, float]:
    """The paper's protocol: mean and std of the test accuracy of the best three by validation.

    Runs that tie at the cut are averaged over: the mean over every choice of three.
    """
    validation, test = values(arm, "validation_accuracy"), values(arm, "test_accuracy")
    cut = np.sort(validation)[-3]
    above, tied = test[validation > cut], test[validation == cut]
    choices = np.array([[*above, *rest] for rest in itertools.combinations(tied, 3 - len(above))])  # (choices, 3)
    return choices.mean(), choices.std(axis=1, ddof=1).mean()


def paired_differences(arm: Arm, other: Arm, *splits: str) -> np.ndarray:
    """arm minus other in test accuracy, of every seed that both have; these splits must be the same."""
    seeds = [seed for seed in arm if seed in other]
    for seed, split in itertools.product(seeds, splits):
        if other[seed][f"{split}_checksum"] != arm[seed][f"{split}_checksum"]:
            both = f"{method_name(other[seed])} and {method_name(arm[seed])}"
            raise Mistake(f"argument RESULTS.jsonl: {both} saw different {split} sets at seed {seed}")
    return np.array([arm[seed]["test_accuracy"] - other[seed]["test_accuracy"] for seed in seeds])


def interval(differences: np.ndarray) -> str:
    """The mean with its 95 % interval by Student's t."""
    n, mean = len(differences), differences.mean()
    half = scipy.stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided permutation test of mean 0 by flipping signs, exact up to 13 pairs; zero differences are kept."""
    options = {"permutation_type": "samples", "n_resamples": 9999, "rng": 0}
    return scipy.stats.permutation_test((differences,), np.mean, **options).pvalue


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) correction for as many tests as there are."""
    order = np.argsort(p_values)
    steps = np.minimum(1, np.sort(p_values) * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


def table_row(arm: Arm, ce: Arm | None, clean: Arm | None) -> dict:
    """One line of the table: a setting and a method; against CE, and against the same arm without noise, if any."""
    record, test, n = next(iter(arm.values())), values(arm, "test_accuracy"), len(arm)
    shown = without_derived(record)
    row = {name: shown[name] for name in (*SETTING, *TUNED)} | {
        "shots": shots(record),
        "translators": record["translators"] and " ".join(record["translators"]),
        "method": method_name(record),
        "top 3 by validation": percent(*top_three(arm)) if n >= 10 else "",
        "all seeds": percent(test.mean(), test.std(ddof=1) if n > 1 else None),
        "n": n,
        "test s.e.": percent((test.mean() * (1 - test.mean()) / record["test_size"]) ** 0.5),
        "seeds": ", ".join(f"{seed}: {percent(arm[seed]['test_accuracy'])}" for seed in sorted(arm)),
    }
    of_paper = PAPER.get((record["task"], row["shots"], record["noise_level"]))
    transfers = "a class" in row["shots"]  # the paper's, from SST-2
    if (of_paper and record["noise"] in (None, "backtranslation") and record["batch_size"] == 16
            and (not transfers or Path(record["model"]).name.startswith("sst2-"))):
        row["paper"] = dict(zip((CE, CE_SCL), of_paper, strict=True)).get(tuple(record[name] for name in METHOD))
    if clean and len(lost := paired_differences(arm, clean, "validation", "test")) > 1:
        row["minus clean [95 %]"] = interval(lost)
    if ce is None or ce is arm:
        return row
    differences = paired_differences(arm, ce, "train", "validation", "test")
    pairs = len(differences)
    if pairs > 1:
        row["minus CE [95 %]"] = interval(differences)
    if pairs >= 6:
        row["p"] = sign_flip_p(np.rint(differences * record["test_size"]))  # whole examples: sums that tie, tie exactly
    row["note"] = f"{pairs} pairs" if pairs < max(n, len(ce)) else ""
    return row


def provenance(settings: dict[tuple, dict[tuple, Arm]]) -> str:
    """How long the runs took, where, and with what."""
    records = [record for arms in settings.values() for arm in arms.values() for record in arm.values()]
    seconds = [record["seconds"] for record in records]
    made_with = [f"{name} {', '.join(sorted({str(record[name]) for record in records}))}" for name in MADE_WITH]
    each = f"{min(seconds):.0f} to {max(seconds):.0f} s"
    return f"{len(records)} runs of {each}, {sum(seconds) / 3600:.1f} h in all; {'; '.join(made_with)}."


def table(args: argparse.Namespace) -> None:
    rows, settings = [], read_arms(args.files)
    for setting, arms in settings.items():
        without_noise = tuple("" if name in NOISE else value for name, value in zip(SETTING, setting, strict=True))
        clean = settings[without_noise] if without_noise in settings and without_noise != setting else {}
        for key in sorted(arms, key=lambda key: tuple(value or 0 for value in key)):
            rows.append(table_row(arms[key], arms.get(CE), clean.get(key)))
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p"] = f"{p:.3f}"

    setting = (*SETTING[2:], *TUNED)  # after task and shots; said once where the whole table shares it
    shared = {name: rows[0][name] for name in setting if len({row[name] for row in rows}) == 1}
    varying = [name for name in setting if name not in shared and name != "shots_per_class"]
    columns = ["task", "shots", *varying, "method", "paper", "top 3 by validation", "all seeds", "n", "minus CE [95 %]",
               "p", "minus clean [95 %]", "test s.e.", "note"]
    columns = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    print(", ".join(f"{name} {value}" for name, value in shared.items() if value is not None) + "\n")
    print_table(columns, [["" if row.get(name) is None else row[name] for name in columns] for row in rows])
    print("\nTest accuracy in %: mean ± sample std (ddof = 1) over n seeds. test s.e.: binomial standard error that "
          "the size of the test set alone leaves.")
    if any(name.startswith("minus") for name in columns):
        print("minus: mean paired difference per seed, with Student's t interval"
              + ("; p: sign-flip permutation test, Holm-corrected over the table." if tested else "."))
    if "paper" in columns:
        print("paper: RoBERTa-Large, few-shot top 3 of 10 seeds; its CE + SCL is the best of 24 (lam, tau).")
    print(f"\n{provenance(settings)}\n\nEvery seed:\n")
    for row in rows:
        cells = [row[name] for name in columns[: columns.index("method") + 1]]
        print(f"- {', '.join(str(cell) for cell in cells if cell is not None)}: {row['seeds']}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        {"score": score, "tsne": tsne, "grid": grid, "table": table}[args.command](args)
    except (Mistake, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main())
