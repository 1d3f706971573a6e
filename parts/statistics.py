"""Computes confidence intervals and means over settings, and the rows and closing lines of a table."""

from collections import Counter

import numpy as np
from scipy.special import stdtrit

from parts.settings import CE, NOISE, Row, Settings, first, matching_row, paired_differences, shown, values


def top_three(row: Row) -> tuple[float, float]:
    """Returns mean and standard deviation of the test accuracy of the best three seeds by validation, as the paper.

    If several seeds tie for the last places, the mean and the variance are averaged over every choice among them.
    """
    validation, test = values(row, "validation_accuracy"), values(row, "test_accuracy")
    cut = np.sort(validation)[-3]
    above, tied = test[validation > cut], test[validation == cut]
    k, n = 3 - len(above), len(tied)
    total = above.sum() + k * tied.mean()
    total_variance = k * (n - k) / max(n - 1, 1) * tied.var()  # of a draw without replacement
    squares = (above**2).sum() + k * (tied**2).mean()
    variance = (squares - (total**2 + total_variance) / 3) / 2
    return total / 3, max(variance, 0) ** 0.5


def top_three_gain(row: Row, ce: Row) -> float | None:
    """Returns the top-three mean of a row minus that of CE, or None if either has fewer than ten seeds."""
    return top_three(row)[0] - top_three(ce)[0] if min(len(row), len(ce)) >= 10 else None


def t_interval(differences: dict[int, float]) -> tuple[float, float, float]:
    """Returns the mean with its 95 % interval by Student's t. One pair has no interval (NaN)."""
    numbers = np.array(list(differences.values()))
    n, mean = len(numbers), numbers.mean()
    half = stdtrit(n - 1, 0.975) * numbers.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return mean, mean - half, mean + half


def test_set_error(row: Row, other: Row) -> float | None:
    """Returns the standard error of the mean paired difference over the test examples.

    Returns None if a record lacks the answers.
    """
    pairs = [(row[seed], other[seed]) for seed in row if seed in other]
    if not pairs or any("correct" not in record for pair in pairs for record in pair):
        return None
    gains = np.mean([one["correct"] - two["correct"] for one, two in pairs], axis=0)  # (test examples,)
    return gains.std() / len(gains) ** 0.5

def cosines(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns the mean cosine over pairs of examples of one class, and over pairs of two classes.

    |sum of z|^2 is the sum of all cosines, so no N x N matrix is needed. The cosine of an example with itself is 1.
    """
    z = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    sizes = np.unique(labels, return_counts=True)[1]
    sums = np.stack([z[labels == label].sum(axis=0) for label in np.unique(labels)])  # (C, D)
    within, everything = (sums**2).sum(), (sums.sum(axis=0) ** 2).sum()
    same_pairs = (sizes**2).sum()
    intra = (within - len(z)) / (same_pairs - len(z)) if same_pairs > len(z) else np.nan
    inter = (everything - within) / (len(z) ** 2 - same_pairs) if len(sizes) > 1 else np.nan
    return float(intra), float(inter)


# ------------------------------------------------------------ means over settings


def agree(intervals: list[tuple[float, float, float]]) -> bool:
    """Returns whether the means have one sign and all intervals overlap. Otherwise their mean describes no setting."""
    means, lows, highs = np.array(intervals).T
    has_one_sign = min(means) >= 0 or max(means) <= 0
    overlap = not np.fmax.reduce(lows) > np.fmin.reduce(highs)  # a setting without an interval (NaN) contradicts none
    return bool(has_one_sign and overlap)


def pooled(gains: list[tuple[str, dict[int, float]]]) -> tuple[float, float, float]:
    """Returns the mean over settings with its 95 % t interval. A setting is a task and its differences by seed.

    A seed's 20 examples are part of its 100 examples, so the settings of a task are not independent, but its seeds
    are. So the variance is that of seeds, each with all its settings. For one setting this is `t_interval`. There is
    no interval (NaN) if a task has fewer than five seeds.
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


def random_effects(settings: list[dict[int, float]]) -> tuple[tuple, tuple, float]:
    """Returns the random-effects mean with its 95 % interval, the prediction interval of a new setting, and I2.

    DerSimonian and Laird (1986). I2 is the share of the variance between settings that seeds do not explain. The
    intervals use Student's t with k - 1 and k - 2 degrees of freedom for k settings, at least three.
    """
    numbers = [np.array(list(differences.values())) for differences in settings]
    means, errors = np.array([(x.mean(), max(x.var(ddof=1) / len(x), 1e-12)) for x in numbers]).T  # never 0
    weights, k = 1 / errors, len(means)
    q = (weights * (means - np.average(means, weights=weights)) ** 2).sum()
    between = max(0.0, (q - (k - 1)) / (weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (errors + between)
    mean, variance = np.average(means, weights=weights), 1 / weights.sum()
    half = stdtrit(k - 1, 0.975) * variance**0.5
    reach = stdtrit(k - 2, 0.975) * (between + variance) ** 0.5
    return (mean, mean - half, mean + half), (mean - reach, mean + reach), max(0.0, 1 - (k - 1) / q) if q else 0.0


# ------------------------------------------------------------ a table

COLUMNS = ("n", "validation", "all seeds", "top 3 by validation", "minus CE [95 %]", "its test s.e.", "paper's gain",
           "top 3 minus CE's", "on validation [95 %]", "minus clean [95 %]", "test s.e.", "note")
EXPLAINED = {
    "validation": "mean validation accuracy in %, to choose among several rows of a method",
    "all seeds": "test accuracy in %, mean ± sample standard deviation over n seeds",
    "top 3 by validation": "the same for the three seeds with the best validation accuracy, the paper's protocol",
    "minus CE [95 %]": "mean paired difference to CE over seeds, with Student's t interval for this row alone. CE has "
                       "the same learning rates and steps, or is the only row of CE",
    "its test s.e.": "standard error of minus CE over the test examples: the effect of other test examples",
    "paper's gain": "the paper's top 3 of CE + SCL with the best of 24 (lam, tau), minus its top 3 of CE",
    "top 3 minus CE's": "our difference between the two values of top 3 by validation, to compare with paper's gain",
    "on validation [95 %]": "the same difference on the validation examples, which also chose the checkpoint",
    "minus clean [95 %]": "mean paired difference to the same method without noise",
    "test s.e.": "binomial standard error of the accuracy, for the size of the test set",
    "mean over settings": "95 % t interval; the independent parts are the seeds of a task with all their settings. "
                          "Settings in which a method has several rows do not count",
    "random effects": "DerSimonian-Laird mean, which treats the settings as a sample of all settings; I2 is the share "
                      "of the variance between settings that seeds do not explain",
}


def percent(mean: float, std: float | None = None) -> str:
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"


def spread(numbers: np.ndarray, digits: int) -> str:
    """Returns mean ± sample standard deviation, or the number itself if there is only one."""
    mean = f"{np.mean(numbers):.{digits}f}"
    return f"{mean} ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else mean


def interval(low: float, high: float) -> str:
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def difference(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} {'(too few seeds)' if np.isnan(low) else interval(low, high)}"


def table_row(row: Row, ce: Row, clean: Row, is_one_of_several: bool) -> dict:
    """Returns the cells of a row. `ce` is its row of CE; `clean` is the row of the same method without noise."""
    record, n, test = shown(first(row)), len(row), values(row, "test_accuracy")
    gained = paired_differences(row, ce, "train", "validation", "test")
    on_validation = paired_differences(row, ce, measure="validation_accuracy")
    lost = paired_differences(row, clean, "validation", "test")
    papers = record["papers_gain"] if ce else None
    top = None if papers is None else top_three_gain(row, ce)
    error = test_set_error(row, ce)
    return record | {
        "shots": record["size"],
        "n": n,
        "validation": percent(values(row, "validation_accuracy").mean()) if is_one_of_several else None,
        "all seeds": spread(100 * test, 1),
        "top 3 by validation": percent(*top_three(row)) if n >= 10 else None,
        "minus CE [95 %]": difference(*t_interval(gained)) if gained else None,
        "its test s.e.": None if error is None else percent(error),
        "paper's gain": None if papers is None else f"{papers:+.1f}",
        "top 3 minus CE's": None if top is None else f"{100 * top:+.1f}",
        "on validation [95 %]": difference(*t_interval(on_validation)) if gained else None,
        "minus clean [95 %]": difference(*t_interval(lost)) if lost else None,
        "test s.e.": percent((test.mean() * (1 - test.mean()) / record["test_size"]) ** 0.5),
        "note": f"{len(gained)} pairs" if ce and len(gained) < max(n, len(ce)) else None,
        "seeds": ", ".join(f"{seed}: {percent(row[seed]['test_accuracy'])}" for seed in sorted(row)),
        "gained": gained,
        "is_one_of_several": is_one_of_several,
    }  # fmt: skip


def table_rows(settings: Settings) -> list[dict]:
    rows = []
    for setting, of_setting in settings.items():
        without_noise = tuple(item for item in setting if item[0] not in NOISE)
        clean = settings.get(without_noise, {}) if without_noise != setting else {}
        for key in sorted(of_setting, key=lambda key: tuple(value or 0 for value in key)):
            row, record = of_setting[key], first(of_setting[key])
            is_one_of_several = sum(other[:3] == key[:3] for other in of_setting) > 1
            ce = matching_row(of_setting, CE, record) if key[:3] != CE else {}
            rows.append(table_row(row, ce, matching_row(clean, key[:3], record), is_one_of_several))
    return rows


def summarise(rows: list[dict]) -> list[str]:
    """Returns the lines below a table: the mean difference of each method over its settings."""
    lines = []
    gains: dict[str, list[tuple[str, dict[int, float]]]] = {}
    for row in rows:
        if row["gained"] and not row["is_one_of_several"]:
            gains.setdefault(row["method"], []).append((row["task"], row["gained"]))
    for method, of_method in gains.items():
        settings = [differences for _, differences in of_method]
        if len(settings) == 1:
            continue
        pairs, n = np.concatenate([list(differences.values()) for differences in settings]), len(settings)
        intervals = [t_interval(differences) for differences in settings]
        ahead = (f"ahead in {sum(mean > 0 for mean, *_ in intervals)} of {n} settings and {(pairs > 0).sum()} of "
                 f"{len(pairs)} pairs.")
        if n == 2 and not agree(intervals):
            found = " and ".join(difference(*of_setting) for of_setting in intervals)
            lines.append(f"{method} minus CE: {found}. The two settings disagree, so they have no mean; {ahead}")
            continue
        mean = pooled(of_method)
        lines.append(f"{method} minus CE, mean over {n} settings: {difference(*mean)}; {ahead}")
        if n > 2 and not np.isnan(mean[1]):
            effect, new, i2 = random_effects(settings)
            lines.append(f"{method} minus CE, random effects: {difference(*effect)}; prediction interval for a new "
                         f"setting {interval(*new)}; I2 = {100 * i2:.0f} %.")
    return lines
