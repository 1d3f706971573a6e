"""Computes confidence intervals, t-SNE, the mean over several settings, and the rows and summary lines of a table."""

from collections import Counter

import numpy as np
from scipy.special import stdtrit

from parts.errors import UserError, explain_errors
from parts.settings import CE, NOISE, Row, Settings, first, matching_row, paired_differences, shown, values


def top_three(row: Row) -> tuple[float, float]:
    """Returns the mean and standard deviation of test accuracy over the three seeds with the best validation accuracy.

    If several seeds tie for third place, computes mean and variance for every possible top three, and averages them.
    """
    validation, test = values(row, "validation_accuracy"), values(row, "test_accuracy")
    cut = np.sort(validation)[-3]
    above, tied = test[validation > cut], test[validation == cut]
    k, n = 3 - len(above), len(tied)
    total = above.sum() + k * tied.mean()
    total_variance = k * (n - k) / max(n - 1, 1) * tied.var()  # variance of the sum of k draws without replacement
    squares = (above**2).sum() + k * (tied**2).mean()
    variance = (squares - (total**2 + total_variance) / 3) / 2
    return total / 3, max(variance, 0) ** 0.5


def top_three_gain(row: Row, ce: Row) -> float | None:
    """Returns the mean test accuracy of the top three seeds of `row` minus that of the top three seeds of `ce`.

    Returns None if `row` or `ce` has fewer than ten seeds.
    """
    return top_three(row)[0] - top_three(ce)[0] if min(len(row), len(ce)) >= 10 else None


def t_interval(differences: dict[int, float]) -> tuple[float, float, float]:
    """Returns the mean of the differences and the two ends of its 95 % t interval (NaN for a single difference)."""
    numbers = np.array(list(differences.values()))
    n, mean = len(numbers), numbers.mean()
    half = stdtrit(n - 1, 0.975) * numbers.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return mean, mean - half, mean + half


def test_set_error(row: Row, other: Row) -> float | None:
    """Returns the standard error of the mean difference between two table rows that comes from the small test set.

    Returns None if a record does not say which predictions are correct.
    """
    pairs = [(row[seed], other[seed]) for seed in row if seed in other]
    if not pairs or any("correct" not in record for pair in pairs for record in pair):
        return None
    gains = np.mean([one["correct"] - two["correct"] for one, two in pairs], axis=0)  # (test examples,)
    return gains.std() / len(gains) ** 0.5


def cosines(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns two mean cosines: over all pairs of examples of one class, and over all pairs from different classes.

    Computes no N x N matrix. For normalised features z, |sum of z|^2 is the sum of the cosines of all pairs. This sum
    also has the cosine of each example with itself, which is 1.
    """
    z = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    sizes = np.unique(labels, return_counts=True)[1]
    sums = np.stack([z[labels == label].sum(axis=0) for label in np.unique(labels)])  # (C, D)
    within, everything = (sums**2).sum(), (sums.sum(axis=0) ** 2).sum()
    same_pairs = (sizes**2).sum()
    intra = (within - len(z)) / (same_pairs - len(z)) if same_pairs > len(z) else np.nan
    inter = (everything - within) / (len(z) ** 2 - same_pairs) if len(sizes) > 1 else np.nan
    return float(intra), float(inter)


def project(features: np.ndarray, run: str) -> np.ndarray:
    """Returns t-SNE coordinates (N, 2) from cosine distances. Rejects features that all point in the same direction."""
    from sklearn.manifold import TSNE

    z = features / np.maximum(np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True), 1e-300)
    if len(z) < 4 or np.ptp(z, axis=0).max() < 1e-6:
        raise UserError(f"argument RUN: {run}: t-SNE needs at least four test examples, and features that differ")
    with explain_errors("RUN", run, "features that t-SNE can draw"):
        tsne = TSNE(metric="cosine", init="pca", perplexity=min(30, (len(z) - 1) / 3), random_state=0)
        return tsne.fit_transform(z)


# ------------------------------------------------------------ means over settings


def agree(intervals: list[tuple[float, float, float]]) -> bool:
    """Returns whether the settings agree: all means have the same sign, and all intervals overlap."""
    means, lows, highs = np.array(intervals).T
    has_one_sign = min(means) >= 0 or max(means) <= 0
    overlap = not np.fmax.reduce(lows) > np.fmin.reduce(highs)  # ignores ends that are NaN
    return bool(has_one_sign and overlap)


def pooled(gains: list[tuple[str, dict[int, float]]]) -> tuple[float, float, float]:
    """Returns the mean difference over settings, and the lower and upper end of its 95 % t interval.

    The list `gains` has the task and the paired differences of each setting. With the same seed, the 100-shot sample
    contains the 20-shot sample. So for one task and seed, the 20-shot and 100-shot results are not independent. Results
    of different seeds are independent. The deviation of a seed is its paired difference minus the mean of the setting.
    The function divides each deviation by sqrt(n (n - 1)), so that the squares of a setting of n seeds add up to its
    squared standard error. For each task and seed, the function then sums the deviations over the settings. A single
    setting gives the same result as `t_interval`. The interval is NaN if a setting has fewer than five seeds.
    """
    means = [np.mean(list(differences.values())) for _, differences in gains]
    mean = np.mean(means)
    if min(len(differences) for _, differences in gains) < 5:
        return mean, np.nan, np.nan
    sums: dict[tuple, float] = Counter()  # maps task and seed to the sum over the settings of the task
    for (task, differences), mean_of_setting in zip(gains, means, strict=True):
        n = len(differences)
        for seed, gain in differences.items():
            sums[task, seed] += (gain - mean_of_setting) / (n * (n - 1)) ** 0.5
    variance = sum(total**2 for total in sums.values())
    freedom = len(sums) - len(dict(gains))
    half = stdtrit(freedom, 0.975) * variance**0.5 / len(gains)
    return mean, mean - half, mean + half


def random_effects(settings: list[dict[int, float]]) -> tuple[tuple, tuple, float]:
    """Returns three values: the mean with its 95 % interval, the 95 % prediction interval for a new setting, and I2.

    The method is from DerSimonian and Laird (1986). I2 is the share of the variance between settings
    that is not due to different seeds. There must be k >= 3 settings. The interval of the mean uses Student's t with
    k - 1 degrees of freedom. The prediction interval uses Student's t with k - 2 degrees of freedom.
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

EXPLAINED = {
    "validation": "mean validation accuracy in %, to choose among several rows of a method",
    "all seeds": "test accuracy in %, mean ± sample standard deviation over n seeds",
    "top 3 by validation": "test accuracy in % of the three seeds with the best validation accuracy, as in the paper",
    "minus CE [95 %]": "mean difference in test accuracy between this row and CE, paired by seed, with Student's t "
                       "interval. CE has the same learning rates and steps as this row, or is the only row of CE",
    "s.e. of difference (test set)": "standard error of the difference to CE, because the test set is only a sample",
    "paper's gain": "difference between CE + SCL (best of 24 lam and tau) and CE in the paper, for the top 3 seeds",
    "top 3 minus CE": "top 3 by validation of this row minus top 3 by validation of CE, to compare with paper's gain",
    "minus CE on validation [95 %]": "mean difference to CE in validation accuracy. The validation examples also chose "
                                     "the checkpoints",
    "minus clean [95 %]": "mean difference to the same method without noise, paired by seed. Without noise, the method "
                          "has the same learning rates and steps as this row, or has only one row",
    "s.e. of accuracy (test set)": "binomial standard error of the accuracy, because the test set is only a sample",
    "mean difference": "mean over settings with 95 % t interval. The seeds of a task are independent, the settings are "
                       "not. A setting does not count if a method has several rows in this setting",
    "random effects": "DerSimonian-Laird mean, which treats the settings as a sample of all settings. I2 is the "
                      "share of the variance between settings that is not due to different seeds",
}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def spread(numbers: np.ndarray, digits: int) -> str:
    """Returns the text "mean ± sample standard deviation", or only the number if there is a single number."""
    mean = f"{np.mean(numbers):.{digits}f}"
    return f"{mean} ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else mean


def interval_text(low: float, high: float) -> str:
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def difference(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} {'(no interval)' if np.isnan(low) else interval_text(low, high)}"


def table_row(row: Row, ce: Row, clean: Row, is_one_of_several: bool) -> dict:
    """Returns the first record of a table row, with the cells of the row.

    The argument `ce` is the row of CE in the same setting, and `clean` is the row of the same method without noise.
    """
    record, n, test = shown(first(row)), len(row), values(row, "test_accuracy")
    minus_ce = paired_differences(row, ce, "train", "validation", "test")
    on_validation = paired_differences(row, ce, measure="validation_accuracy")
    minus_clean = paired_differences(row, clean, "validation", "test")
    papers_gain = record["papers_gain"] if ce else None
    top = None if papers_gain is None else top_three_gain(row, ce)
    error = test_set_error(row, ce)
    cells = {
        "n": n,
        "validation": percent(values(row, "validation_accuracy").mean()) if is_one_of_several else None,
        "all seeds": spread(100 * test, 1),
        "top 3 by validation": " ± ".join(map(percent, top_three(row))) if n >= 10 else None,
        "minus CE [95 %]": difference(*t_interval(minus_ce)) if minus_ce else None,
        "s.e. of difference (test set)": None if error is None else percent(error),
        "paper's gain": None if papers_gain is None else f"{papers_gain:+.1f}",
        "top 3 minus CE": None if top is None else f"{100 * top:+.1f}",
        "minus CE on validation [95 %]": difference(*t_interval(on_validation)) if minus_ce else None,
        "minus clean [95 %]": difference(*t_interval(minus_clean)) if minus_clean else None,
        "s.e. of accuracy (test set)": percent((test.mean() * (1 - test.mean()) / record["test_size"]) ** 0.5),
        "note": f"{len(minus_ce)} pairs" if ce and len(minus_ce) < max(n, len(ce)) else None,
    }
    seeds = ", ".join(f"{seed}: {percent(row[seed]['test_accuracy'])}" for seed in sorted(row))
    return record | {"shots": record["size"], "cells": cells, "seeds": seeds, "minus_ce": minus_ce,
                     "is_one_of_several": is_one_of_several}


def table_rows(settings: Settings) -> list[dict]:
    rows = []
    for setting, of_setting in settings.items():
        without_noise = tuple(item for item in setting if item[0] not in NOISE)
        clean = settings.get(without_noise, {}) if without_noise != setting else {}
        for key in sorted(of_setting, key=lambda key: tuple(value or 0 for value in key)):
            row, record = of_setting[key], first(of_setting[key])
            is_one_of_several = sum(first(other)["loss"] == record["loss"] for other in of_setting.values()) > 1
            ce = matching_row(of_setting, CE, record) if record["loss"] != CE else {}
            rows.append(table_row(row, ce, matching_row(clean, record["loss"], record), is_one_of_several))
    return rows


def summarise(rows: list[dict]) -> list[str]:
    """Returns the summary lines below a table: for each method, the mean difference to CE over all settings."""
    lines, of_methods = [], dict[str, list[dict]]()
    for row in rows:
        if row["minus_ce"] and not row["is_one_of_several"]:
            of_methods.setdefault(row["method"], []).append(row)
    for method, of_method in of_methods.items():
        settings = [row["minus_ce"] for row in of_method]
        if len(settings) == 1:
            continue
        pairs, n = np.concatenate([list(differences.values()) for differences in settings]), len(settings)
        intervals = [t_interval(differences) for differences in settings]
        better = (f"{method} is better than CE in {sum(mean > 0 for mean, *_ in intervals)} of {n} settings and in "
                  f"{(pairs > 0).sum()} of {len(pairs)} pairs of runs with the same seed.")
        if n == 2 and not agree(intervals):
            lines.append(f"The results of the two settings disagree, so no mean is given. {better}")
            continue
        mean = pooled([(row["task"], row["minus_ce"]) for row in of_method])
        lines.append(f"The mean difference between {method} and CE over {n} settings, in points: {difference(*mean)}. "
                     f"{better}")
        if n > 2 and not np.isnan(mean[1]):
            effect, new, i2 = random_effects(settings)
            lines.append(f"With random effects, the mean difference between {method} and CE is {difference(*effect)} "
                         f"points. The 95 % prediction interval for a new setting is {interval_text(*new)}. I2 is "
                         f"{100 * i2:.0f} %.")
    return lines
