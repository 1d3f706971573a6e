"""parts.pictures: what the figures show, read from their artists."""

import itertools
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from fakes import fake, pairs, write
from parts import pictures
from parts.errors import UserError
from parts.settings import LIMITS, add_fields, read_effects, read_grid

RESULTS = Path(pictures.__file__).parents[1] / "results"
SEED, MEAN, GROUP = "a seed", "mean, 95 % interval", "mean of a group"
MINUS = "\N{MINUS SIGN}"
PAPERS, TOP = "top 3 seeds in the paper", "top 3 seeds by validation"


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved. Only then do they have their final size."""
    figures, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, *args: (figures.append(figure), save(figure, *args)))
    return figures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, *_: figures.append(figure))
    return figures


# ------------------------------------------------------------ effects


def effects(drawn, *files):
    pictures.draw_effects(read_effects([str(file) for file in files]), "x.png")
    return drawn[-1]


def lines_of(figure):
    """Returns the text of every line, a heading or a label."""
    panel = figure.axes[0]
    headings = {text.get_position()[1]: text.get_text() for text in panel.texts if text.get_weight() == "bold"}
    labels = [text.get_text() for text in panel.get_yticklabels()]
    return [label or headings[y] for y, label in enumerate(labels)]


def marks(figure, label):
    """Returns (x, y) of every mark of this kind."""
    lines = [line for line in figure.axes[0].lines if line.get_label() == label]
    return [(x, y) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_effects_shows_each_setting_with_seeds_mean_interval_and_the_papers_gain(tmp_path, drawn):
    gains = [0.01, 0.03, -0.02, 0.04, 0.05]
    file = write(tmp_path, *pairs(gains), *pairs(gains[:3], task="qnli"), *pairs([-0.02], shots=1000))
    figure = effects(drawn, file)
    assert lines_of(figure) == ["encoder, cls pooling, lr 1e-5, 200 steps", "SST-2, N = 20", "QNLI, N = 20",
                                "SST-2, N = 1000"]
    assert marks(figure, MEAN) == [(pytest.approx(2.2), 1), (pytest.approx(2 / 3), 2), (pytest.approx(-2), 3)]
    assert sorted(x for x, y in marks(figure, SEED) if 1 < y < 2) == pytest.approx(sorted(100 * x for x in gains))
    assert [x for x, _ in marks(figure, PAPERS)] == pytest.approx([2.2, 10.7, 0.1])
    low, high = scipy.stats.t.interval(0.95, 4, 2.2, scipy.stats.sem(100 * np.array(gains)))
    assert any(line.get_xdata() == pytest.approx([low, high]) for line in figure.axes[0].lines
               if line.get_label() == "_interval")
    numbers = [text.get_text() for text in figure.axes[0].texts if text.get_text()[0] in f"+-{MINUS}"]
    assert numbers == ["+2.2", "+0.7", f"{MINUS}2.0"]


def test_our_top_three_stands_where_the_papers_stands(tmp_path, drawn):
    """Seeds 7, 8 and 9 have the best validation accuracy."""
    ten = [fake(seed, lam, 0.7 + (lam > 0) * seed / 100, seed / 10) for seed in range(10) for lam in (0, 0.9)]
    other = [record | {"shots": 50} for record in ten]  # the paper has no such setting
    figure = effects(drawn, write(tmp_path, *ten, *other, *pairs([0.01, 0.02], task="qnli")))
    assert marks(figure, TOP) == [(pytest.approx(8), lines_of(figure).index("SST-2, N = 20") - 0.23)]


def test_a_group_has_a_mean_only_if_its_settings_agree(tmp_path, drawn):
    def group(*of_tasks):
        records = [pairs([gain - 0.01, gain, gain + 0.01, gain, gain], task=task) for task, gain in of_tasks]
        figure = effects(drawn, write(tmp_path, *itertools.chain(*records)))
        return lines_of(figure), marks(figure, GROUP)

    lines, means = group(("sst2", 0.02), ("qnli", 0.025))
    assert lines[-1] == "mean, N = 20" and means == [(pytest.approx(2.25), 3)]
    for disagreeing in ((("sst2", 0.089), ("qnli", -0.001)), (("sst2", 0.1), ("qnli", 0.01))):
        lines, means = group(*disagreeing)
        assert len(lines) == 3 and not means


def test_two_learning_rates_of_one_task_have_no_mean(tmp_path, drawn):
    """A mean over the same examples would count the task twice."""
    gains = [0.01, 0.02, 0.03, 0.02, 0.02]
    for others in ([], pairs(gains, task="qnli")):
        figure = effects(drawn, write(tmp_path, *pairs(gains), *pairs(gains, lr=1e-4), *others))
        assert len(lines_of(figure)) == 3 + len(others) // 10 and not marks(figure, GROUP)


def test_a_mean_of_settings_with_noise_names_its_number_of_examples(tmp_path, drawn):
    gains = [0.01, 0.02, 0.03, 0.02, 0.02]
    noisy = [pairs(gains, task=task, shots=shots, noise="word", noise_level=0.3)
             for task in ("sst2", "qnli") for shots in (20, 100)]
    told = lines_of(effects(drawn, write(tmp_path, *itertools.chain(*noisy))))
    means = [line for line in told if "mean" in line]
    assert means == ["mean, N = 20, word noise 0.3", "mean, N = 100, word noise 0.3"]


def test_settings_with_different_noise_have_no_mean(tmp_path, drawn):
    gains = [0.01, 0.02, 0.03, 0.02, 0.02]
    noisy = [pairs(gains, task=task, noise=noise, noise_level=0.3)
             for task, noise in (("sst2", "word"), ("qnli", "label"))]
    assert not marks(effects(drawn, write(tmp_path, *itertools.chain(*noisy))), GROUP)


def test_a_group_with_too_few_seeds_has_no_mean(tmp_path, drawn):
    figure = effects(drawn, write(tmp_path, *pairs([0.01, 0.02]), *pairs([0.01, 0.02], task="qnli")))
    assert len(lines_of(figure)) == 3


def test_encoders_come_in_the_order_of_the_files(tmp_path, drawn):
    files = [write(tmp_path, *pairs([0.01], model=model), name=f"{model}.jsonl") for model in ("small", "base")]
    for order in (files, files[::-1]):
        headings = [line for line in lines_of(effects(drawn, *order)) if "cls pooling" in line]
        assert [heading.split(",")[0] for heading in headings] == [file.stem for file in order]


def test_a_label_names_what_is_not_usual(tmp_path, drawn):
    ce, scl = pairs([0.01], shots=100)
    records = [*pairs([0.01]), *pairs([0.01], task="qnli"), *pairs([0.01], task="/my/TREC6", batch_size=64),
               *pairs([0.01], pooling="mean"), ce | {"lr": 2e-5, "head_lr": 2e-5, "steps": 100}, scl,
               *pairs([0.01], task="rte", head_lr=1e-3), *pairs([0.01], noise="word", noise_level=0.3),
               *pairs([0.01], precision="bf16")]
    assert lines_of(effects(drawn, write(tmp_path, *records))) == [
        "encoder, cls pooling, lr 1e-5, 200 steps", "SST-2, N = 20\nprecision fp32", "QNLI, N = 20",
        "TREC-6, N = 20\nbatch size 64", "SST-2, N = 20\nmean pooling", "RTE, N = 20\nhead lr 1e-3",
        "SST-2, N = 20\nprecision bf16", "SST-2, N = 100\nlr 2e-5 / 1e-5, 100 / 200 steps",
        "SST-2, N = 20, word noise 0.3"]


def test_a_label_says_that_the_classifier_has_no_learning_rate_of_its_own(tmp_path, drawn):
    records = [*pairs([0.01], head_lr=1e-3), *pairs([0.01], task="qnli", head_lr=1e-3), *pairs([0.01], task="rte")]
    heading, sst2, _, rte = lines_of(effects(drawn, write(tmp_path, *records)))
    assert heading == "encoder, cls pooling, lr 1e-5, head lr 1e-3, 200 steps"
    assert (sst2, rte) == ("SST-2, N = 20", "RTE, N = 20\nhead lr as lr")


@pytest.mark.parametrize("field, one, two, text", [
    ("dropout", 0.1, 0, "dropout 0"), ("eval_every", 20, 40, "eval every 40"), ("task", "a/own", "b/own", "b/own"),
    ("model", "a/encoder", "b/encoder", "b/encoder"), ("translators", ["en-de", "de-en"], ["x", "y"], "['x', 'y']")])
def test_comparisons_of_different_runs_have_different_labels(tmp_path, drawn, field, one, two, text):
    noise = {"noise": "backtranslation", "noise_level": 0.7}
    records = [pairs([0.01], **noise, **{field: value}) for value in (one, two)]
    lines = lines_of(effects(drawn, write(tmp_path, *itertools.chain(*records))))
    assert len(lines) == (4 if field == "model" else 3) and sum(text in line for line in lines) == 1


def test_a_label_shows_all_details_and_the_number_of_pairs(tmp_path, drawn):
    records = [*pairs([0.01, 0.02]), *pairs([0.01, 0.02], task="qnli"),
               *pairs([0.01, 0.02], head_lr=1e-3, steps=150, lr=2e-5, batch_size=64)[:-1]]
    told = lines_of(effects(drawn, write(tmp_path, *records)))
    details = told[3].split("\n")
    assert details[0] == "SST-2, N = 20" and all(len(line) <= 32 for line in details)
    assert " ".join(details[1:]) == "lr 2e-5, head lr 1e-3, 150 steps, batch size 64, n = 1"
    assert told[1:3] == ["SST-2, N = 20", "QNLI, N = 20"]


def test_encoders_with_long_names_have_their_own_headings(tmp_path, drawn):
    records = [record for language in ("german", "french") for task in ("sst2", "qnli")
               for record in pairs([0.01], task=task, model=f"distilbert-base-multilingual-cased-finetuned-{language}")]
    told = lines_of(effects(drawn, write(tmp_path, *records)))
    assert [" ".join(told[i].split()) for i in (0, 3)] == [
        f"distilbert-base-multilingual-cased-finetuned-{language}, cls pooling, lr 1e-5, 200 steps"
        for language in ("german", "french")]


def test_shots_come_first_then_all_of_train_then_noise_and_transfer_has_its_own_heading(tmp_path, drawn):
    checkpoint = "runs/sst2-n60-lam0-seed0-0a1b2c"
    records = [*pairs([0.1], noise="word", noise_level=0.3), *pairs([0.1], model=checkpoint), *pairs([0.1], shots=None),
               *pairs([0.1], shots=100), *pairs([0.1])]
    told = lines_of(effects(drawn, write(tmp_path, *records)))
    assert told[1:5] == ["SST-2, N = 20", "SST-2, N = 100", "SST-2, all of train", "SST-2, N = 20, word noise 0.3"]
    assert told[5].startswith("transfer from sst2-n60, ") and told[6:] == ["SST-2, N = 20"]


def test_dots_do_not_overlap(tmp_path, saved):
    file = write(tmp_path, *pairs([0.01] * 4 + [0.0101, 0.0102, 0.03]))
    pictures.draw_effects(read_effects([str(file)]), str(tmp_path / "x.png"))
    (figure,) = saved
    dots = np.array(marks(figure, SEED))
    assert len(dots) == 7 and dots[:, 1].max() < 1.7  # above the next line
    pixels = figure.axes[0].transData.transform(dots)
    distances = [np.hypot(*(one - two)) for one, two in itertools.combinations(pixels, 2)]
    assert min(distances) >= 2.5 * figure.dpi / 72  # the diameter of a dot


def test_no_mark_hides_another_kind_of_mark(tmp_path, saved):
    """All gains of a row are equal to the paper's gain, and a stack of ten seeds is above the second row."""
    file = write(tmp_path, *pairs([0.022] * 10), *pairs([0.107] * 10, task="qnli"))
    pictures.draw_effects(read_effects([str(file)]), str(tmp_path / "x.png"))
    (figure,) = saved
    spans = []
    for line in figure.axes[0].lines:
        if line.get_label() in (SEED, MEAN, PAPERS):
            y = figure.axes[0].transData.transform(np.array(line.get_data()).T)[:, 1]
            reach = line.get_markersize() / 2 * figure.dpi / 72
            spans.append((y.min() - reach, y.max() + reach))
    assert len(spans) == 6
    spans.sort()
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(spans))


def test_values_beyond_the_axis_are_marked(tmp_path, drawn):
    figure = effects(drawn, write(tmp_path, *pairs([-0.3, 0.0, 0.01, 0.25, 0.28], ce=0.5)))
    panel = figure.axes[0]
    assert panel.get_xlim() == (-8, 18)
    assert {f"← {MINUS}30", "+25, +28 →"} <= {text.get_text() for text in panel.texts}
    assert len(marks(figure, SEED)) == 2 and len(marks(figure, "_beyond")) == 2


def test_a_mean_is_never_beyond_the_axis(tmp_path, drawn):
    figure = effects(drawn, write(tmp_path, *pairs([0.4, 0.5], ce=0.4), *pairs([-0.4], task="qnli")))
    low, high = figure.axes[0].get_xlim()
    assert low <= -40 and high >= 45


def test_a_diamond_is_never_beyond_the_axis(tmp_path, drawn):
    records = [fake(seed, lam, 0.6 + (lam > 0) * (0.25 if seed > 6 else 0.02), seed / 10)
               for seed in range(10) for lam in (0, 0.9)]
    for shots, limit in ((20, 25), (50, 18)):  # with 50 shots, the paper has no result, so the figure has no diamond
        figure = effects(drawn, write(tmp_path, *(record | {"shots": shots} for record in records)))
        assert figure.axes[0].get_xlim() == (-8, limit)


def test_more_than_25_lines_have_no_means_of_groups(tmp_path, drawn, capsys):
    """A mean for each of two groups would make 26 lines."""
    both = [pairs([0.01, 0.02, 0.01, 0.02, 0.015], task=f"task{i}", shots=n) for i in range(12) for n in (20, 100)]
    assert not marks(effects(drawn, write(tmp_path, *itertools.chain(*both))), GROUP)
    assert "not drawn: means of groups, because the figure has more than 25 lines" in capsys.readouterr().err
    assert len(marks(effects(drawn, write(tmp_path, *itertools.chain(*both[:-2]))), GROUP)) == 2


def test_effects_of_all_committed_records(tmp_path):
    figure = tmp_path / "effects.png"
    pictures.draw_effects(read_effects([str(file) for file in sorted(RESULTS.glob("*.jsonl"))]), str(figure))
    height, width, _ = matplotlib.image.imread(figure).shape
    assert 900 <= width <= 1200 and height > width / 2


# ------------------------------------------------------------ grid


def grid(drawn, file):
    pictures.draw_grid(*read_grid([str(file)]), "x.png")
    return drawn[-1]


def test_a_grid_shows_the_paired_differences_to_ce_and_their_spread(tmp_path, drawn):
    ce, low, high = (0.70, 0.74), (0.71, 0.78), (0.69, 0.70)
    records = [fake(seed, lam, 0.8, validation[seed], tau=tau) for seed in (0, 1)
               for lam, tau, validation in ((0, None, ce), (0.9, 0.3, low), (0.9, 0.5, high))]
    panel, bar = grid(drawn, write(tmp_path, *records)).axes
    assert [text.get_text() for text in panel.texts] == ["+2.5\n± 2.1", f"{MINUS}2.5\n± 2.1"]
    assert panel.images[0].get_array().ravel().tolist() == pytest.approx([2.5, -2.5])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.3", "0.5"]
    assert bar.get_ylabel() == "points above CE, 72.0" and "τ" in panel.get_xlabel() and "λ" in panel.get_ylabel()
    assert "SST-2, N = 20" in drawn[-1].get_suptitle() and "over 2 seeds" in drawn[-1].get_suptitle()


def test_full_colour_needs_a_clear_difference(tmp_path, drawn):
    """Three paired differences have the standard deviation 2. The half width of their 95 % interval is 4.97."""
    records = [fake(seed, lam, 0.8, 0.7 + (lam > 0) * gain) for seed, gain in enumerate((-0.01, 0.01, 0.03))
               for lam in (0, 0.9)]
    image = grid(drawn, write(tmp_path, *records)).axes[0].images[0]
    assert image.get_clim() == pytest.approx((-9.937, 9.937), abs=1e-3)


def test_numbers_are_readable_on_every_colour(tmp_path, drawn):
    """The contrast ratio of WCAG 2 is at least 4.3."""
    gains = np.linspace(-0.1, 0.1, 81)
    records = [fake(0, 0, 0.8, 0.5), *(fake(0, 0.5, 0.8, 0.5 + gain, tau=0.3 + gain) for gain in gains)]
    panel = grid(drawn, write(tmp_path, *records)).axes[0]
    image = panel.images[0]

    def luminance(colour):
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    for text in panel.texts:
        x, y = text.get_position()
        pair = luminance(text.get_color()), luminance(image.cmap(image.norm(image.get_array()[y, x])))
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.3


def test_half_a_point_of_one_seed_is_not_full_colour(tmp_path, drawn):
    records = [fake(0, 0, 0.8, 0.7), fake(0, 0.9, 0.8, 0.705), fake(0, 0.5, 0.8, 0.695)]
    assert grid(drawn, write(tmp_path, *records)).axes[0].images[0].get_clim() == (-2, 2)


def test_a_grid_names_another_number_of_steps_of_ce(tmp_path, drawn):
    figure = grid(drawn, write(tmp_path, fake(0, 0, 0.8, 0.65, steps=100), fake(0, 0.9, 0.8, 0.7)))
    assert figure.axes[1].get_ylabel() == "points above CE with 100 steps, 65.0"


def test_a_grid_names_another_learning_rate_of_ce(tmp_path, drawn):
    figure = grid(drawn, write(tmp_path, fake(0, 0, 0.8, 0.65, lr=1e-4), fake(0, 0.9, 0.8, 0.7)))
    assert figure.axes[1].get_ylabel() == "points above CE with lr 1e-4, 65.0"


def test_a_grid_without_ce_is_relative_to_its_mean(tmp_path, drawn):
    records = [fake(0, 0, 0.8), fake(1, 0.9, 0.8, 0.7), fake(1, 0.5, 0.8, 0.6)]  # CE has another seed
    panel, bar = grid(drawn, write(tmp_path, *records)).axes
    assert bar.get_ylabel() == "points above the mean of all cells, 65.0"
    assert [text.get_text() for text in panel.texts] == ["+5.0", f"{MINUS}5.0"]


def test_a_grid_of_many_cells_has_a_limited_size(tmp_path):
    """A grid is at most 20 x 40 inches with 150 dots per inch."""
    for lams, taus in (([1], range(1, 91)), (range(1, 91), [1])):
        file = write(tmp_path, *(fake(0, lam / 100, 0.8, tau=tau / 100) for lam, tau in itertools.product(lams, taus)))
        pictures.draw_grid(*read_grid([str(file)]), str(tmp_path / "grid.png"))
        height, width, _ = matplotlib.image.imread(tmp_path / "grid.png").shape
        assert width <= 3000 and height <= 6000


# ------------------------------------------------------------ t-SNE


def cloud(names, rows=10, **record):
    """Returns a test set of `rows` examples, all answered right."""
    labels = np.arange(rows) % len(names)
    features = np.random.default_rng(0).normal(size=(rows, 5))
    record = add_fields(fake(0, 0, 0.8) | record, LIMITS)
    return record, tuple(names), labels, np.eye(len(names))[labels], features


def legend(figure):
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def test_all_panels_share_one_legend(drawn):
    tests = [cloud(["a", "b"]), cloud(["a", "b"], lam=0.9, tau=0.3), cloud(["b", "c"])]
    pictures.draw_tsne(tests, [], "x.png")
    figure = drawn[0]
    assert legend(figure) == ["a", "b", "c"] and not any(panel.get_legend() for panel in figure.axes)
    colours = [[matplotlib.colors.to_hex(points.get_facecolor()[0]) for points in panel.collections]
               for panel in figure.axes]
    assert colours[0] == colours[1] and colours[0][1] == colours[2][0] and colours[2][1] not in colours[0]


def test_panels_have_no_axis_numbers_and_their_points_fill_them(drawn):
    pictures.draw_tsne([cloud(["a", "b"], rows=40)], [], "x.png")
    (panel,) = drawn[0].axes
    assert not list(panel.get_xticks()) and not list(panel.get_yticks())
    points = np.concatenate([points.get_offsets() for points in panel.collections])
    for values, (low, high) in zip(points.T, (panel.get_xlim(), panel.get_ylim()), strict=True):
        assert np.ptp(values) > 0.85 * (high - low)


def test_five_runs_are_in_pairs(drawn):
    pictures.draw_tsne([cloud(["a", "b"])] * 5, [], "x.png")
    assert len(drawn[0].axes) == 6 and sum(panel.axison for panel in drawn[0].axes) == 5


def test_titles_name_what_differs_and_the_figure_what_all_share(drawn):
    tests = [cloud(["a", "b"]), cloud(["a", "b"], lam=0.9, tau=0.3, lr=1e-4, head_lr=1e-4), cloud(["a", "b"], seed=1)]
    pictures.draw_tsne(tests, ["lr"], "x.png")
    assert drawn[0].get_suptitle() == "t-SNE of test features: SST-2, N = 20"
    assert [panel.get_title() for panel in drawn[0].axes] == [
        "CE, seed 0\naccuracy 100.0 %, lr 1e-5", "CE + SCL (λ = 0.9, τ = 0.3), seed 0\naccuracy 100.0 %, lr 1e-4",
        "CE, seed 1\naccuracy 100.0 %, lr 1e-5"]


def test_a_title_has_short_lines_and_is_not_cut(drawn):
    tests = [cloud(["a", "b"], lam=0.9, tau=0.3, task=f"customer_reviews_of_germany_{year}", batch_size=size)
             for year, size in ((2023, 8), (2024, 8), (2024, 16))]
    pictures.draw_tsne(tests, ["batch_size"], "x.png")
    titles = [panel.get_title() for panel in drawn[0].axes]
    assert [title.replace("\n", " ") for title in titles] == [
        f"customer_reviews_of_germany_{year}, batch_size {size} accuracy 100.0 %"
        for year, size in ((2023, 8), (2024, 8), (2024, 16))]
    assert all(len(line) <= 40 for title in titles for line in title.split("\n"))


def test_text_in_a_figure_is_never_a_formula(monkeypatch, tmp_path):
    names = ["_x", "$5 to $10", r"$\frac$", "a_b^c"]
    figures, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, *_: figures.append(figure))
    pictures.draw_tsne([cloud(names, task=r"$\frac$ x"), cloud(names, task="y")], [], "x.png")
    save(figures[0], str(tmp_path / "x.png"), 4, 4)
    assert legend(figures[0]) == names and figures[0].axes[0].get_title().startswith(r"$\frac$ x")
    texts = [figures[0].axes[0].title, *figures[0].legends[0].get_texts()]
    assert not any(text.get_parse_math() for text in texts) and (tmp_path / "x.png").is_file()


def test_long_class_names_are_not_cut(drawn):
    names = [f"delivery was late because of the {cause}" for cause in ("carrier", "weather")]
    pictures.draw_tsne([cloud(names)], [], "x.png")
    assert [" ".join(text.split("\n")) for text in legend(drawn[0])] == names


def test_classes_with_equal_looks_are_reported(drawn, capsys):
    pictures.draw_tsne([cloud([f"class {number}" for number in range(37)], rows=74)], [], "x.png")
    assert "only 36 of 37 classes have a colour and marker of their own" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [2, 7, 12, 36])
def test_classes_have_different_looks(drawn, classes):
    names = [f"class {number}" for number in range(classes)]
    pictures.draw_tsne([cloud(names, rows=2 * classes)], [], "x.png")
    looks = {(matplotlib.colors.to_hex(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes())
             for points in drawn[0].axes[0].collections}
    assert len(looks) == classes and legend(drawn[0]) == names


def test_too_few_or_equal_features_are_refused(drawn):
    *test, features = cloud(["a", "b"])
    few = [cloud(["a", "b"], rows=rows) for rows in (1, 2, 3)]
    equal = [(*test, alike) for alike in (np.full_like(features, 0.3), np.full_like(features, np.nan),
                                          np.zeros_like(features), np.outer(np.arange(1, 11), [1, 2, 3.3]))]
    for refused in (*few, *equal):
        with pytest.raises(UserError, match=r"argument RUN: run\d+"):
            pictures.draw_tsne([refused], [], "x.png")
    assert not drawn


@pytest.mark.parametrize("features", [
    np.repeat([[1.0, 2.0], [2.0, 1.0]], 50, axis=0), np.eye(4, dtype="f"), np.eye(40, 2), 1 + 1e-5 * np.eye(40),
    np.float32(1e-30) * np.arange(40, dtype=np.float32).reshape(10, 4)])
def test_almost_equal_features_have_a_figure(drawn, features):
    labels = np.arange(len(features)) % 2
    record, names, *_ = cloud(["a", "b"])
    pictures.draw_tsne([(record, names, labels, np.eye(2)[labels], features)], [], "x.png")
    assert all(np.isfinite(points.get_offsets()).all() for points in drawn[0].axes[0].collections)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"argument -o: .*x\.nonsense cannot be written"):
        pictures.draw_tsne([cloud(["a", "b"])], [], str(tmp_path / "x.nonsense"))
    assert not list(tmp_path.iterdir())


def test_a_format_whose_program_is_missing_is_reported(tmp_path, monkeypatch):
    def savefig(*_, **__):
        raise RuntimeError("xelatex not found")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    with pytest.raises(UserError, match=r"argument -o: .*x\.pgf cannot be written: xelatex not found"):
        pictures.draw_tsne([cloud(["a", "b"])], [], str(tmp_path / "x.pgf"))
