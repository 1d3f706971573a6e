"""Reports the results of finetune.py: tables, figures, and predictions of checkpoints.

    python eval.py table runs/results.jsonl [...]            # markdown table of the methods
    python eval.py effects results/*.jsonl -o FIG.png        # figure of the differences between CE + SCL and CE
    python eval.py grid runs/results.jsonl -o FIG.png        # figure over lam and tau: validation accuracy minus CE
    python eval.py score runs/RUN [RUN ...] [--task T]       # metrics on the test set, geometry of the features
    python eval.py tsne runs/RUN_CE runs/RUN_SCL -o FIG.png  # Figures 2 and 3 of the paper
    python eval.py predict runs/RUN [FILE]                   # class and probability of each text
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import numpy as np
from scipy.special import softmax

from parts.data import Split
from parts.errors import UserError, explain_errors, is_out_of_memory, one_line, prepare_stdout
from parts.flags import Parser
from parts.settings import add_names, compared_fields, conflict, read_effects, read_grid, read_run, read_settings, shown
from parts.statistics import EXPLAINED, cosines, spread, summarise, table_rows
from parts.tasks import TASKS, load_data, read_texts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    records, picture, device, runs, texts = (Parser(add_help=False) for _ in range(5))
    records.add_argument("files", nargs="+", metavar="RESULTS.jsonl", help="file with the records of finetune.py, "
                         "or the folder of this file")
    picture.add_argument("-o", "--output", required=True, metavar="FIG.png", help="output file (.png, .pdf ...)")
    device.add_argument("--device", help="cpu, cuda or mps (default: the fastest device of this machine)")
    runs.add_argument("runs", nargs="+", metavar="RUN", help="checkpoint folder")
    runs.add_argument("--task", help="task of the test set (default: the task of the run)")
    runs.add_argument("--data-dir", help="folder with the GLUE files (default: the folder that the run used)")
    texts.add_argument("run", metavar="RUN", help="checkpoint folder")
    texts.add_argument("file", nargs="?", default="/dev/stdin", metavar="FILE",
                       help="table (.csv, .tsv, .jsonl, .parquet) with the columns 'text' and optionally "
                            "'text_pair', or a text file with one example per line. A tab separates the two texts of a "
                            "pair (default: standard input)")

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
        if not os.path.isdir(output.parent):  # os.path.isdir returns False for a name that is too long
            raise UserError(f"argument -o: no folder {output.parent}; make it or choose another")
        if not output.suffix:
            raise UserError(f"argument -o: {output} has no ending; expected one such as .png or .pdf")
    return args


# ------------------------------------------------------------ table


def print_table(header: list[str], rows: list[list]) -> None:
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join("" if cell is None else one_line(cell).replace("|", "\\|") for cell in cells) + " |")


def table(args: argparse.Namespace) -> None:
    settings = read_settings(args.files)
    records = [record for rows in settings.values() for row in rows.values() for record in row.values()]
    lines = table_rows(settings)

    compared = compared_fields(records)
    named = ("task", "shots", *compared[:-4])  # without learning rates and steps
    if len({tuple(str(line.get(name)) for name in named) for line in lines}) < len(settings):
        compared.append("test_checksum")
    shared = {name: lines[0].get(name) for name in compared if len({str(line.get(name)) for line in lines}) == 1}
    fields = ["task", "shots", *(name for name in compared if name not in shared), "method"]
    columns = [name for name in lines[0]["cells"] if any(line["cells"][name] is not None for line in lines)]
    print(one_line(", ".join(f"{name} {value}" for name, value in shared.items() if value is not None)) + "\n")
    print_table([*fields, *columns], [[*map(line.get, fields), *map(line["cells"].get, columns)] for line in lines])

    summaries = summarise(lines)
    for summary in summaries:
        print(f"\n{summary}")
    print()
    for name in [*columns, *(name for name in EXPLAINED if any(name in summary for summary in summaries))]:
        if name in EXPLAINED:
            print(f"{name}: {EXPLAINED[name]}.")

    seconds = [record["seconds"] for record in records]
    made_with = [f"{name}: {', '.join(sorted({one_line(record.get(name)) for record in records}))}"
                 for name in ("device", "python", "torch", "transformers", "commit")]
    print(f"\n{len(records)} run{'s' * (len(records) > 1)}. Each run took {min(seconds):.0f} to {max(seconds):.0f} s; "
          f"all runs together took {sum(seconds) / 3600:.1f} h. {'; '.join(made_with)}.\n\n"
          "Test accuracy of each seed, in %:\n")
    for line in lines:
        cells = [one_line(line[name]) for name in fields if line.get(name) is not None]
        print(f"- {', '.join(cells)}: {line['seeds']}")


# ------------------------------------------------------------ figures of records


def effects(args: argparse.Namespace) -> None:
    from parts.pictures import draw_effects

    draw_effects(read_effects(args.files), args.output)


def grid(args: argparse.Namespace) -> None:
    from parts.pictures import draw_grid

    draw_grid(*read_grid(args.files), args.output)


# ------------------------------------------------------------ checkpoints: score, tsne, predict


def run_checkpoint(folder: str, record: dict, names: tuple[str, ...], split: Split, device: str | None,
                   check: bool = False):
    """Returns the output of a checkpoint: class logits (N, C), in the order of `names`, and features (N, D).

    Prints a warning if texts have more tokens than the model reads. If `check` is true, also checks the vocabulary.
    """
    import transformers

    from parts.model import predict
    from parts.pretrained import check_vocabulary, load_model, load_tokenizer, long_texts
    from parts.ranks import pick_device

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = len(split.texts[0])
    if found != (expected := record.get("num_texts", found)):  # old records lack num_texts
        raise UserError(f"argument RUN: {folder} expects {expected} text(s) per example, got {found}")
    tokenizer = load_tokenizer(folder, record["pooling"], record["max_length"])
    texts = split.texts
    warnings = check_vocabulary(tokenizer, texts, folder, first=None) if check else long_texts(tokenizer, texts)
    for warning in warnings:
        print(f"{one_line(folder)}: warning: {warning}", file=sys.stderr)
    model = load_model(folder, record["pooling"], names, tokenizer, 0.0, record["ce_temperature"])
    if model.classifier_is_new:
        raise UserError(f"argument RUN: {folder} has no trained classifier for {', '.join(names)}")
    model.to(pick_device(device))
    return predict(model, split, record["precision"])


def evaluate(folder: str, args: argparse.Namespace):
    """Evaluates a checkpoint on the test set of the checkpoint's own task, or on the test set of --task.

    Returns five values: the record, and the class names, labels, class logits and features of the test set.
    """
    record = read_run(folder)
    task = args.task or record["task"]
    data_dir = args.data_dir or (record["data_dir"] if task in TASKS else None)
    data = load_data(task, data_dir, bool(record["shots"] or record["shots_per_class"]))
    is_its_own = data.test.checksum == record["test_checksum"]
    if args.task is None and not is_its_own:
        raise UserError(f"argument RUN: {folder} was tested on other data than {task} has now; give --task or "
                        "--data-dir")
    names = data.label_names
    if args.task is not None or not is_its_own:
        from parts.pretrained import assign_classes

        names = assign_classes(folder, task, names)
    class_logits, features = run_checkpoint(folder, record, names, data.test, args.device, check=True)
    accuracy, recorded = np.mean(class_logits.argmax(axis=1) == data.test.labels), record.get("test_accuracy")
    if is_its_own and isinstance(recorded, float) and abs(accuracy - recorded) > 1e-9:
        print(f"{one_line(folder)}: the accuracy is {accuracy:.4f}, but the record has {recorded:.4f}; the device, a "
              "library or the weights have changed", file=sys.stderr)
    return record | {"task": task}, names, data.test.labels, class_logits, features


def evaluate_all(args: argparse.Namespace) -> tuple[list[tuple], list[str]]:
    """Returns two lists: the result of `evaluate` for each run, and the names of the fields in which records differ."""
    tests = [evaluate(folder, args) for folder in dict.fromkeys(map(os.path.normpath, args.runs))]
    add_names([record for record, *_ in tests])
    records = [shown(record) for record, *_ in tests]
    return tests, [name for name in compared_fields(records) if len({str(record.get(name)) for record in records}) > 1]


def score(args: argparse.Namespace) -> None:
    from sklearn.metrics import confusion_matrix

    tests, differing = evaluate_all(args)
    rows, arms, problems = [], dict[tuple, tuple](), []
    if len({record["ce_temperature"] for record, *_ in tests}) > 1:
        differing.append("ce_temperature")
    for record, _, labels, class_logits, features in tests:
        details = [shown(record).get(name) for name in differing]
        measures = measure(labels, class_logits.argmax(axis=1), features)
        shares = [np.bincount(labels).max() / len(labels), *measures.values()]
        numbers = [len(labels), *(f"{share:.4f}" for share in shares)]
        rows.append([record["run"], shown(record)["task"], *details, *numbers])
        _, row = arms.setdefault((record["setting"], record["row"]), ([record["arm"], *details], {}))
        if problem := conflict(row, record):
            problems.append(problem)
        row.setdefault(record["seed"], record | {"measures": [*measures.values()]})
    print_table(["run", "task", *differing, "test examples", "largest class", *measures], rows)

    if problems:
        print(f"no means over the seeds: {problems[0]}", file=sys.stderr)
    elif max(len(row) for _, row in arms.values()) > 1:
        print("\nMean ± sample standard deviation over the seeds:\n")
        cells = []
        for names, row in arms.values():
            columns = np.transpose([record["measures"] for record in row.values()])
            cells.append([*names, len(row), *(spread(column, 3) for column in columns)])
        print_table(["runs", *differing, "n", *measures], cells)

    for record, names, labels, class_logits, _ in tests:
        print(f"\n{record['run']}\n")
        counts = confusion_matrix(labels, class_logits.argmax(axis=1), labels=range(len(names)))
        print_table(["true \\ predicted", *names], [[name, *line] for name, line in zip(names, counts, strict=True)])


def measure(labels: np.ndarray, predicted: np.ndarray, features: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import silhouette_score

    from parts.model import classification_metrics

    within, between = cosines(features, labels)
    metrics, classes = classification_metrics(labels, predicted), len(set(labels))
    return {
        "accuracy": metrics["accuracy"],
        "macro-F1": metrics["macro_f1"],
        "MCC": metrics["mcc"] if classes > 1 else np.nan,
        "cosine within a class": within,
        "between classes": between,
        "silhouette": silhouette_score(features, labels, metric="cosine") if 1 < classes < len(labels) else np.nan,
    }


def tsne(args: argparse.Namespace) -> None:
    from parts.pictures import draw_tsne

    draw_tsne(*evaluate_all(args), args.output)


def predict(args: argparse.Namespace) -> None:
    from parts.pretrained import saved_classes

    record = read_run(args.run)
    with explain_errors("FILE", args.file, "one text per line in UTF-8, or a table with the column text"):
        rows = read_texts(args.file)
    names = saved_classes(args.run)
    class_logits, _ = run_checkpoint(args.run, record, names, Split(rows, np.zeros(len(rows), dtype=int)), args.device)
    for probabilities in softmax(class_logits, axis=1):
        best = probabilities.argmax()
        print(f"{one_line(names[best])}\t{probabilities[best]:.4f}")


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        args.command(args)
        return 0
    except (UserError, OSError) as error:
        message = str(error).replace("argument --model", "argument RUN")  # the model is a checkpoint folder
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = "argument --device: out of memory; choose a device with more free memory"
    print(f"eval.py: error: {one_line(message, 600)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # lets `eval.py ... | head` end without an error message
    prepare_stdout()
    sys.exit(main())
