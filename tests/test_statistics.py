"""parts.statistics: intervals and means against their definitions, published numbers and simulation."""

import itertools

import numpy as np
import pytest
import scipy.stats

from fakes import fake
from parts import statistics


@pytest.mark.parametrize("validation", [
    [0.9, 0.8, 0.7, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.9, 0.8, 0.8, 0.8, 0.8, 0, 0, 0, 0, 0], [0.5] * 10,
    [0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
])
def test_top_three_is_the_mean_over_every_choice_among_ties(validation):
    test = np.random.default_rng(0).uniform(0.5, 1, 10)
    row = {seed: fake(seed, 0, test[seed], validation[seed]) for seed in range(10)}
    order = sorted(validation)
    choices = [list(three) for three in itertools.combinations(range(10), 3)
               if sorted(validation[i] for i in three) == order[-3:]]
    mean, std = statistics.top_three(row)
    assert mean == pytest.approx(np.mean([test[three].mean() for three in choices]))
    assert std == pytest.approx(np.mean([test[three].var(ddof=1) for three in choices]) ** 0.5)


def test_top_three_of_five_hundred_ties_is_the_mean_and_deviation_of_all():
    test = np.random.default_rng(0).uniform(0.5, 1, 500)
    row = {seed: fake(seed, 0, accuracy, 0.5) for seed, accuracy in enumerate(test)}
    assert statistics.top_three(row) == pytest.approx((test.mean(), test.std(ddof=1)))


def test_the_gain_of_the_top_three_needs_ten_seeds_of_both_methods():
    ce = {seed: fake(seed, 0, 0.7 + seed / 100, seed / 10) for seed in range(10)}
    row = {seed: fake(seed, 0.9, 0.9 - seed / 100, seed / 10) for seed in range(10)}
    assert statistics.top_three_gain(row, ce) == pytest.approx(0.82 - 0.78)  # seeds 7, 8 and 9 of both
    assert statistics.top_three_gain(row, {seed: ce[seed] for seed in range(9)}) is None


def test_students_interval():
    numbers = [0.1, 0.4, -0.7, 1.1]
    expected = scipy.stats.t.interval(0.95, 3, np.mean(numbers), scipy.stats.sem(numbers))
    assert statistics.t_interval(dict(enumerate(numbers))) == pytest.approx((np.mean(numbers), *expected))
    assert np.isnan(statistics.t_interval({0: 0.1})[1:]).all()


def test_the_pooled_interval_of_one_setting_is_students():
    differences = {0: 0.1, 1: 0.4, 2: -0.7, 3: 1.1, 4: 1.9, 5: 0.35}
    assert statistics.pooled([("sst2", differences)]) == pytest.approx(statistics.t_interval(differences))


def test_settings_with_other_seeds_are_independent_and_may_differ_in_number():
    ten, five = np.random.default_rng(0).normal(size=(2, 10)) * ((1,), (5,))
    five = five[:5]
    mean, low, high = statistics.pooled([("sst2", dict(enumerate(ten))), ("sst2", dict(enumerate(five, start=10)))])
    error = (scipy.stats.sem(ten) ** 2 + scipy.stats.sem(five) ** 2) ** 0.5 / 2
    assert mean == pytest.approx((ten.mean() + five.mean()) / 2)
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, 14, mean, error))  # 15 seeds


def test_a_second_setting_of_the_same_seeds_does_not_narrow_the_interval_but_a_second_task_does():
    differences = dict(enumerate((0.1, 0.4, -0.7, 1.1, 1.9, 0.35, -0.2, 0.8)))
    alone = statistics.pooled([("sst2", differences)])
    assert statistics.pooled([("sst2", differences), ("sst2", dict(differences))]) == pytest.approx(alone)
    _, low, high = statistics.pooled([("sst2", differences), ("qnli", differences)])
    narrower = scipy.stats.t.ppf(0.975, 14) / scipy.stats.t.ppf(0.975, 7) / 2**0.5
    assert high - low == pytest.approx(narrower * (alone[2] - alone[1]))
    assert np.isnan(statistics.pooled([("sst2", differences), ("qnli", dict(enumerate((0.1, 0.5, 0.2, 0.3))))])[1])
    assert np.isnan(statistics.pooled([("sst2", differences), ("sst2", {0: 0.5})])[1])  # one seed beside many


def test_the_pooled_interval_holds_the_truth_as_often_as_it_says():
    """Simulates two tasks with three settings of ten seeds. A seed has one effect on all settings of its task."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        draws = 0.7 * rng.normal(size=(2, 1, 10)) + rng.normal(size=(2, 3, 10))
        gains = [(str(task), dict(enumerate(setting))) for task, of_task in enumerate(draws) for setting in of_task]
        _, low, high = statistics.pooled(gains)
        held += low <= 0 <= high
    assert 0.92 <= held / 500 <= 0.98


def test_random_effects_of_the_bcg_trials_are_the_published_ones():
    """Log risk ratios and variances of 13 trials of the BCG vaccine; metafor's DerSimonian-Laird estimates."""
    means = [-0.8893, -1.5854, -1.3481, -1.4416, -0.2175, -0.7861, -1.6209, 0.0120, -0.4694, -1.3713, -0.3394, 0.4459,
             -0.0173]
    variances = [0.3256, 0.1946, 0.4154, 0.0200, 0.0512, 0.0069, 0.2230, 0.0040, 0.0564, 0.0730, 0.0124, 0.5325, 0.0714]
    settings = [{0: mean - v**0.5, 1: mean + v**0.5} for mean, v in zip(means, variances, strict=True)]
    (mean, low, high), (new_low, new_high), i2 = statistics.random_effects(settings)
    assert mean == pytest.approx(-0.7141, abs=5e-4) and i2 == pytest.approx(0.9212, abs=5e-4)
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 12) * 0.1787, abs=2e-3)
    reach = scipy.stats.t.ppf(0.975, 11) * (0.3088 + 0.1787**2) ** 0.5
    assert (new_low, new_high) == pytest.approx((mean - reach, mean + reach), abs=2e-3)


def test_random_effects_of_settings_that_agree_weigh_by_precision():
    settings = [{0: 0.9, 1: 1.1}, {0: 0.8, 1: 1.2}, {0: 0.9, 1: 1.1, 2: 1.0}]
    (mean, *_), (new_low, new_high), i2 = statistics.random_effects(settings)
    assert mean == pytest.approx(1) and i2 == 0 and new_low < 1 < new_high
    (mean, *_), _, _ = statistics.random_effects([{0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}])
    assert mean == 0


@pytest.mark.parametrize("intervals, expected", [
    ([(1, 0, 2), (2, 1, 3)], True), ([(1, 0, 2), (-1, -2, 1)], False), ([(1, 0, 2), (5, 4, 6)], False),
    ([(8.9, 4.7, 13.2), (-0.1, -1, 0.7)], False), ([(1, np.nan, np.nan), (2, 1, 3)], True),
    ([(-1, -3, 1), (-2, -4, 0)], True)])
def test_settings_agree_if_their_signs_do_and_their_intervals_overlap(intervals, expected):
    assert statistics.agree(intervals) is expected


def test_the_test_sets_error_of_one_seed_is_mcnemars_and_of_two_equal_seeds_the_same():
    rng = np.random.default_rng(0)
    ce, scl = (rng.random((2, 403)) < [[0.6], [0.7]]).astype(int)
    only_ce, only_scl = (ce > scl).sum(), (scl > ce).sum()
    expected = (only_ce + only_scl - (only_scl - only_ce) ** 2 / 403) ** 0.5 / 403
    for seeds in ((0,), (0, 1)):
        rows = [{seed: {"correct": correct} for seed in seeds} for correct in (scl, ce)]
        assert statistics.test_set_error(*rows) == pytest.approx(expected)
    assert statistics.test_set_error({0: {"correct": scl}}, {0: {}}) is None  # an old record
    assert statistics.test_set_error({0: {"correct": scl}}, {1: {"correct": ce}}) is None


def test_cosines_equal_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 4)), np.arange(30) % 3
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [(labels[i] == labels[j], z[i] @ z[j]) for i, j in itertools.combinations(range(30), 2)]
    expected = [np.mean([cosine for same, cosine in pairs if same == wanted]) for wanted in (True, False)]
    assert statistics.cosines(features, labels) == pytest.approx(expected)
