"""Draws the figures of eval.py: differences between CE and CE + SCL, the grid over λ and τ, and t-SNE of features."""

import math
import sys
import textwrap
from collections import Counter

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.special import stdtrit

from parts.errors import UserError, one_line
from parts.settings import NOISE, Row, first, is_transfer, paired_differences, rates_and_steps, shown, values
from parts.statistics import agree, pooled, project, t_interval, top_three_gain

NAMES = {"sst2": "SST-2", "qnli": "QNLI", "mnli": "MNLI", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "qqp": "QQP",
         "wnli": "WNLI", "amazon_polarity": "Amazon", "yelp_polarity": "Yelp", "TREC6": "TREC-6"}
# The colours are the colour-blind-safe colours of Okabe and Ito.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "o^sDvP"
MOST_LINES = 25
# A label has the values of these fields only if it would otherwise be equal to another label.
HIDDEN = ("translators", "eval_every", "precision", "micro_batch_size", "compile", "test_checksum")
NOT_IN_LABEL = {"task", "base_model", "shots", "shots_per_class", *NOISE, "test_size", *HIDDEN}
HEADING = ("pooling", "lr", "head_lr", "steps")
SAME_LR = "head lr as lr"  # a heading does not show this text

matplotlib.rcParams["text.parse_math"] = False  # a text with dollar signs is not a formula


def save(figure, output: str, width: float, height: float) -> None:
    """Saves the figure, at most 20 by 40 inches large."""
    figure.set_size_inches(min(width, 20), min(height, 40))
    try:
        figure.savefig(output, dpi=150)
    except (ValueError, RuntimeError) as error:  # an unknown file format, or a format whose program is missing
        raise UserError(f"argument -o: {output} cannot be written: {error}") from None
    print(f"picture in {one_line(output)}")


def task_name(record: dict) -> str:
    return one_line(NAMES.get(record["task_name"], record["task_name"]), 100)


def size_name(record: dict) -> str:
    return "all of train" if record["size"] == "all" else f"N = {record['size']}"


def short(number: object) -> str:
    """Returns a value as a short text, such as "1e-4" for 0.0001."""
    is_small = isinstance(number, float) and 0 < number < 0.01
    return np.format_float_scientific(number, trim="-", exp_digits=1) if is_small else one_line(number, 100)


def signed(number: float, digits: int = 1) -> str:
    """Returns the number as text with a plus sign or a typographic minus sign."""
    return f"{number:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


# ------------------------------------------------------------ effects


def draw_effects(pairs: list[tuple[Row, Row]], output: str) -> None:
    """Draws a line of the figure for each comparison of CE + SCL with CE.

    A line shows one dot per seed. A line also shows the mean, its 95 % interval, and the gain that the paper reports.
    """
    figure = Figure(layout="constrained")
    panel = figure.subplots()
    encoders = dict.fromkeys(encoder_name(row) for row, _ in pairs)  # encoder names in the order of the files
    groups = [[pair for pair in pairs if encoder_name(pair[0]) == encoder] for encoder in encoders]
    lines = [line for encoder, group in zip(encoders, groups, strict=True) for line in effect_lines(encoder, group)]
    if sum(interval is not None for _, interval, _ in lines) > MOST_LINES:
        lines = [line for line in lines if line[1] is None or line[2]]
        print(f"not drawn: means of groups, because the figure has more than {MOST_LINES} lines", file=sys.stderr)

    heights = [max(1, (label.count("\n") + 1) / 2) for label, *_ in lines]
    centres = np.cumsum(heights) - np.array(heights) / 2 - 0.5
    low, high = axis_limits([interval for _, interval, _ in lines if interval], pairs)
    panel.set(xlim=(low, high), ylim=(sum(heights) - 0.4, -0.6), xlabel="difference in test accuracy, points")
    for y, (label, interval, pair) in zip(centres, lines, strict=True):
        if interval is None:
            heading = panel.annotate(label, (0.01, y), xycoords=("figure fraction", "data"), va="center", weight="bold")
            heading.set(in_layout=False, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        else:
            draw_effect(panel, y, interval, *pair)

    marks = {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}
    panel.axvline(0, color="black", linewidth=0.8, zorder=0)
    panel.spines[["left", "top", "right"]].set_visible(False)
    panel.tick_params(axis="y", length=0, pad=8)
    panel.set_yticks(centres, [label if interval else "" for label, interval, _ in lines])
    figure.suptitle("CE + SCL (λ = 0.9, τ = 0.3) minus CE, paired by seed", fontsize=11)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, output, 6, 1.7 + 0.4 * sum(heights))


def encoder_name(row: Row) -> str:
    record = first(row)
    name = one_line(record["model_name"])
    return f"transfer from {name}" if is_transfer(record) else name


def effect_lines(encoder: str, pairs: list[tuple[Row, Row]]) -> list[tuple]:
    """Returns the lines of the figure for one encoder. Each line is a tuple: label, interval, pair of table rows.

    The lines are a heading, the comparisons of CE + SCL with CE, and the means over all tasks with the same number of
    examples, if each task has one comparison. The heading shows the most frequent pooling, learning rates and number of
    steps. The label of a comparison shows only the hyperparameters whose values differ from those in the heading.
    """
    all_fields = [label_fields(*pair) for pair in pairs]
    usual = {name: Counter(fields.get(name) for fields in all_fields).most_common(1)[0][0] for name in all_fields[0]}
    all_details = [[text for name, text in fields.items() if text != usual.get(name)] for fields in all_fields]
    labels = [effect_label(*pair, details) for pair, details in zip(pairs, all_details, strict=True)]
    groups: dict[tuple, list[tuple]] = {}
    for (row, ce), label, details in zip(pairs, labels, all_details, strict=True):
        record = first(row)
        others = [first(other) for (other, _), text in zip(pairs, labels, strict=True) if text == label]
        differing = [f"{name.replace('_', ' ')} {short(record.get(name))}" for name in HIDDEN
                     if any(other.get(name) != record.get(name) for other in others)]
        label = effect_label(row, ce, [*differing, *details])
        number = int(record["shots"] or record["shots_per_class"] or 10**9)
        key = (record["noise_text"], bool(record["shots_per_class"]), number, size_name(record))
        groups.setdefault(key, []).append((label, t_interval(paired_differences(row, ce)), (row, ce)))

    heading = ", ".join([encoder, *(usual[name] for name in HEADING if usual[name] != SAME_LR)])
    lines: list[tuple] = [(textwrap.fill(heading, 72), None, None)]
    for (noise, *_, size), group in sorted(groups.items()):
        lines += group
        gains = [(first(row)["task"], paired_differences(row, ce)) for _, _, (row, ce) in group]
        each_task_once, mean = len(gains) == len(dict(gains)) > 1, pooled(gains)
        if each_task_once and agree([interval for _, interval, _ in group]) and not np.isnan(mean[1]):
            lines.append((", ".join(filter(None, ["mean", size, noise])), mean, ()))
    return lines


def effect_label(row: Row, ce: Row, details: list[str]) -> str:
    """Returns a label of two or more lines: first task, number of examples and noise, then the details."""
    record = first(row)
    name = ", ".join(filter(None, [task_name(record), size_name(record), record["noise_text"]]))
    if (n := len(paired_differences(row, ce))) < max(len(row), len(ce)):
        details = [*details, f"n = {n}"]
    return "\n".join([*textwrap.wrap(name, 32), *textwrap.wrap(one_line(", ".join(details)), 32)])


def label_fields(row: Row, ce: Row) -> dict[str, str]:
    """Returns a text for each hyperparameter. The text "lr 2e-5 / 1e-5" means lr 2e-5 for CE and 1e-5 for CE + SCL."""
    record, text = first(row), {}
    for name in ("lr", "head_lr", "steps"):
        text[name] = " / ".join(dict.fromkeys(short(of_row[name]) for of_row in (first(ce), record)))
    fields = {"pooling": f"{record['pooling']} pooling", "lr": f"lr {text['lr']}",
              "head_lr": f"head lr {text['head_lr']}" if text["head_lr"] != text["lr"] else SAME_LR,
              "steps": f"{text['steps']} steps"}
    names = (name for name, _ in record["setting"] if name not in (*fields, *NOT_IN_LABEL))
    return fields | {name: f"{name.replace('_', ' ')} {short(record[name])}" for name in names}


def axis_limits(intervals: list[tuple], pairs: list[tuple[Row, Row]]) -> tuple[float, float]:
    """Returns the ends of the axis: -8 and 18 points. Extends the axis to show each mean, cross and green diamond."""
    marks = [100 * mean for mean, *_ in intervals]
    for row, ce in pairs:
        if (papers := first(row)["papers_gain"]) is not None:
            marks += [papers, 100 * (top_three_gain(row, ce) or 0)]
    return math.floor(min(-8, *marks)), math.ceil(max(18, *marks))


def draw_effect(panel, y: float, interval: tuple[float, float, float], row: Row | None = None,
                ce: Row | None = None) -> None:
    """Draws one line of the figure: the comparison of `row` with `ce`. If `row` is None, draws the mean of a group."""
    mean, low, high = (100 * part for part in interval)
    shape, colour, label = ("s", "#0072B2", "mean, 95 % interval") if row else ("D", "black", "mean of a group")
    if row:
        draw_seeds(panel, y, [100 * gain for gain in paired_differences(row, ce).values()])
        papers, top = first(row)["papers_gain"], top_three_gain(row, ce)
        if papers is not None and top is not None:
            panel.plot([100 * top], [y - 0.23], "d", color="#009E73", markersize=5, label="top 3 seeds by validation")
        if papers is not None:
            panel.plot([papers], [y - 0.23], "x", color="#D55E00", markersize=5, mew=1.8,
                       label="top 3 seeds in the paper")
    panel.plot([low, high], [y, y], color=colour, linewidth=1.8, label="_interval")
    left, right = panel.get_xlim()
    for is_beyond, end, arrow in ((low < left, left + 0.4, "<"), (high > right, right - 0.4, ">")):
        if is_beyond:
            panel.plot([end], [y], arrow, color=colour, markersize=7, clip_on=False, label="_beyond")
    panel.plot([mean], [y], shape, color=colour, markersize=6, label=label)
    panel.text(1.03, y, signed(mean), transform=panel.get_yaxis_transform(), va="center")


def draw_seeds(panel, y: float, gains: list[float]) -> None:
    """Draws a dot for each seed. Stacks overlapping dots. A value outside the axis range is written as a number."""
    low, high = panel.get_xlim()
    width = (high - low) / 75  # width of a dot on the axis
    ends: list[float] = []  # for each row of stacked dots: position of the rightmost dot
    dots = []
    for gain in sorted(gain for gain in gains if low <= gain <= high):
        level = next((i for i, end in enumerate(ends) if gain - end >= width), len(ends))
        ends[level:level + 1] = [gain]
        dots.append((gain, level))
    step = min(0.1, 0.4 / len(ends)) if ends else 0
    panel.plot([gain for gain, _ in dots], [y + 0.2 + step * level for _, level in dots], "o", color="grey",
               markersize=2.5, label="a seed")
    for beyond, x, align, form in ((sorted(gain for gain in gains if gain < low), low, "left", "← {}"),
                                   (sorted(gain for gain in gains if gain > high), high, "right", "{} →")):
        if beyond:
            text = form.format(", ".join(signed(gain, 0) for gain in beyond))
            panel.text(x, y + 0.25, text, ha=align, va="center", fontsize=9, color="dimgrey")


# ------------------------------------------------------------ grid


def draw_grid(cells: dict[tuple, Row], ce: Row, output: str) -> None:
    """Draws the validation accuracy of each pair (lam, tau) minus the validation accuracy of CE.

    The colour scale is as wide as the 95 % interval or wider, so that uncertain differences look pale.
    """
    accuracies = {cell: 100 * values(row, "validation_accuracy") for cell, row in cells.items()}
    centre = 100 * values(ce, "validation_accuracy").mean() if ce else np.mean([x.mean() for x in accuracies.values()])
    gains = {cell: 100 * np.array(list(paired_differences(row, ce, measure="validation_accuracy").values()))
             if ce else accuracies[cell] - centre for cell, row in cells.items()}
    lams, taus = (sorted(set(numbers)) for numbers in zip(*cells, strict=True))
    means = np.full((len(lams), len(taus)), np.nan)
    for (lam, tau), gain in gains.items():
        means[lams.index(lam), taus.index(tau)] = gain.mean()
    n = len(next(iter(cells.values())))
    spread = np.sqrt(np.mean([gain.var(ddof=1) for gain in gains.values()])) if n > 1 else 0
    half = stdtrit(n - 1, 0.975) * spread / n**0.5 if n > 1 else 0
    reach = max(2, np.nanmax(np.abs(means)), 2 * half)

    figure = Figure(layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(means, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    record = first(min(cells.values(), key=lambda row: first(row)["lam"]))
    base = "the mean of all cells"
    if ce:
        texts = {"lr": "lr {}", "head_lr": "head lr {}", "steps": "{} steps"}
        differing = [texts[name].format(short(first(ce)[name])) for name in rates_and_steps(record)
                     if first(ce)[name] != record[name]]
        base = f"CE with {', '.join(differing)}" if differing else "CE"
    figure.colorbar(image, label=f"points above {base}, {centre:.1f}")
    for (lam, tau), gain in gains.items():
        text = signed(gain.mean()) + (f"\n± {gain.std(ddof=1):.1f}" if n > 1 else "")
        brightness = np.dot(image.cmap(image.norm(gain.mean()))[:3], (0.3, 0.6, 0.1))
        colour = "white" if brightness < 0.45 else "black"
        panel.text(taus.index(tau), lams.index(lam), text, ha="center", va="center", color=colour)
    panel.set(xticks=range(len(taus)), xticklabels=taus, yticks=range(len(lams)), yticklabels=lams,
              xlabel="temperature τ", ylabel="weight of SCL, λ")
    figure.suptitle(f"{task_name(record)}, {size_name(record)}: validation accuracy minus {base}\n"
                    f"mean ± sample standard deviation over {n} seed{'s' * (n > 1)}", fontsize=10)
    save(figure, output, 2.6 + 0.85 * len(taus), 1.8 + 0.55 * len(lams))


# ------------------------------------------------------------ t-SNE


def draw_tsne(tests: list[tuple], differing: list[str], output: str) -> None:
    """Draws a panel for each test set (record, class names, labels, class logits, features), with one legend for all.

    The list `differing` names the fields in which the records differ.
    """
    columns = len(tests) if len(tests) <= 3 else 2  # more than three checkpoints: two panels per row
    rows = math.ceil(len(tests) / columns)
    classes = list(dict.fromkeys(name for _, names, *_ in tests for name in names))
    looks = [{"color": COLOURS[i % 6], "marker": MARKERS[(i + i // 6) % 6]} for i in range(len(classes))]
    if len(classes) > 36:
        print(f"note: only 36 of {len(classes)} classes have a colour and marker of their own", file=sys.stderr)
    shared, titles = tsne_titles(tests, differing)

    figure = Figure(layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(tests):]:
        panel.set_axis_off()
    for panel, title, (record, names, labels, _, features) in zip(axes.flat, titles, tests, strict=False):
        points = project(features, record["run"])
        for number, name in enumerate(names):
            panel.scatter(*points[labels == number].T, s=14, alpha=0.7, linewidths=0, **looks[classes.index(name)])
        panel.set_title(title, fontsize=10)
        panel.set(xticks=[], yticks=[], box_aspect=1)
    figure.suptitle(textwrap.fill(shared, 45 * columns), fontsize=11)
    handles = [Line2D([], [], linestyle="", **look) for look in looks]
    legend = figure.legend(handles, range(len(classes)), loc="outside lower center", ncols=4 if columns > 1 else 2,
                           frameon=False)
    labels = [textwrap.fill(one_line(name), 24) for name in classes]
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)  # set late, because matplotlib hides a label that starts with "_"
    legend_height = 0.2 * math.ceil(len(classes) / 4) * max(label.count("\n") + 1 for label in labels)
    save(figure, output, 3.3 * columns + 0.2, 3.6 * rows + 0.6 + legend_height)


def tsne_titles(tests: list[tuple], differing: list[str]) -> tuple[str, list[str]]:
    """Returns the title of the figure, which says what all panels have in common, and a list of panel titles."""
    parts = []
    for record, *_ in tests:
        shown_values = {name: shown(record).get(name) for name in differing}
        details = ["" if value is None else f"{name} {short(value)}" for name, value in shown_values.items()]
        method = record["method"]
        if 0 < record["lam"] < 1:
            method = method.replace("(", "(λ = ").replace(", ", ", τ = ")
        parts.append((task_name(record), size_name(record), method, f"seed {record['seed']}", *details))
    is_shared = [len(set(column)) == 1 for column in zip(*parts, strict=True)]
    shared = ", ".join(part for part, same in zip(parts[0], is_shared, strict=True) if same and part)
    titles = []
    for part, (_, _, labels, class_logits, _) in zip(parts, tests, strict=True):
        own = [text for text, same in zip(part, is_shared, strict=True) if not same and text]
        accuracy = f"accuracy {100 * np.mean(labels == class_logits.argmax(axis=1)):.1f} %"
        lines = ", ".join(own[:2]), ", ".join([accuracy, *own[2:]])
        titles.append("\n".join(textwrap.fill(line, 40) for line in lines))
    return f"t-SNE of test features: {shared}" if shared else "t-SNE of test features", titles
