"""eval.py: the statistics of the table against definitions, and every command on real records and checkpoints."""

import itertools
import json

import matplotlib.image
import numpy as np
import pytest
from conftest import run, write_lines

import eval as evaluate
import finetune
from data import read_records


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """CE and CE + SCL for two seeds, with checkpoints."""
    out = tmp_path_factory.mktemp("pair")
    records = run(out, "--shots", 20, "--lam", 0, 0.9, "--tau", 0.3, 0.5, "--seed", 0, 1, "--save")
    return out, records


RUNS = itertools.count()


def fake(seed, lam, test, validation=0.5, **other):
    """A record of no run, as far as the table reads it."""
    config = dict.fromkeys(evaluate.FIELDS)
    return config | {
        "run": str(next(RUNS)), "model": "encoder", "seconds": 60, "head_lr": 1e-5, "eval_every": 20,
        "train_checksum": f"{seed}", "validation_checksum": f"{seed}",
        "task": "sst2", "shots": 20, "batch_size": 16, "lr": 1e-5, "steps": 200, "test_checksum": "t", "test_size": 400,
        "lam": lam, "tau": 0.3 if lam else None, "seed": seed, "test_accuracy": test, "validation_accuracy": validation,
    } | other


def write(tmp_path, *records, name="results.jsonl"):
    write_lines(tmp_path / name, map(json.dumps, records))
    return tmp_path / name


def tables(capsys, command, *argv):
    """What a command prints: its markdown tables as lists of dicts."""
    assert evaluate.main([command, *map(str, argv)]) == 0
    blocks = itertools.groupby(capsys.readouterr().out.splitlines(), lambda line: line.startswith("|"))
    cells = [[[cell.strip() for cell in line[2:-2].split(" | ")] for line in block] for table, block in blocks if table]
    return [[dict(zip(header, line, strict=True)) for line in body] for header, _, *body in cells]


def rows(capsys, *files):
    (table,) = tables(capsys, "table", *files)
    return table


# ------------------------------------------------------------ table


def test_table_mean_std_and_paired_difference(tmp_path, capsys):
    ce, scl = [0.80, 0.82, 0.87], [0.84, 0.83, 0.88]
    records = [fake(seed, lam, test) for lam, tests in ((0, ce), (0.9, scl)) for seed, test in enumerate(tests)]
    first, second = rows(capsys, write(tmp_path, *records))
    assert (first["method"], first["all seeds"], first["n"]) == ("CE", "83.0 ± 3.6", "3")  # sample std: 3.606
    assert (second["method"], second["all seeds"]) == ("CE + SCL (0.9, 0.3)", "85.0 ± 2.6")
    assert second["minus CE [95 %]"] == "+2.0 [-2.3, +6.3]"  # 4, 1, 1: std 1.732, t(2) 4.303
    assert "p" not in second and "top 3 by validation" not in second
    assert first["test s.e."] == "1.9"  # sqrt(.83 .17 / 400)


def test_one_seed_has_no_std_and_no_interval(tmp_path, capsys):
    _, second = rows(capsys, write(tmp_path, fake(0, 0, 0.8), fake(0, 0.9, 0.9)))
    assert second["all seeds"] == "90.0" and "minus CE [95 %]" not in second


def test_top_three_by_validation_averages_over_ties():
    test, validation = [0.9, 0.8, 0.7, 0.6] + [0.1] * 6, [0.9, 0.8, 0.7, 0.7] + [0.1] * 6
    arm = {seed: fake(seed, 0, test[seed], validation[seed]) for seed in range(10)}
    mean, std = evaluate.top_three(arm)
    either = [[0.9, 0.8, 0.7], [0.9, 0.8, 0.6]]
    assert mean == pytest.approx(np.mean(either)) and std == pytest.approx(np.std(either, axis=1, ddof=1).mean())
    backwards = dict(reversed(arm.items()))
    assert evaluate.top_three(backwards) == pytest.approx((mean, std))


def test_top_three_and_p_need_their_seeds(tmp_path, capsys):
    def both(n):
        records = (fake(s, lam, 0.8 + (s + lam) / 100, s / 100) for lam in (0, 0.9) for s in range(n))
        return write(tmp_path, *records)

    assert "p" not in rows(capsys, both(5))[1]
    six = rows(capsys, both(6))[1]
    assert six["p"] == "0.031" and "top 3 by validation" not in six  # 2 / 2**6
    ten = rows(capsys, both(10))[1]
    assert ten["p"] == "0.002" and ten["top 3 by validation"] == "88.9 ± 1.0"


@pytest.mark.parametrize("differences", [[1, 2, 3, -1, 0, 4], [0, 0, 0, 0, 0, 1], [0] * 6, [5, 1, -2, -7, 3, 3, 0]])
def test_p_is_the_share_of_sign_flips_at_least_as_far(differences):
    flips = np.array(list(itertools.product((1, -1), repeat=len(differences)))) @ differences
    expected = np.mean(np.abs(flips) >= abs(sum(differences)))
    assert evaluate.sign_flip_p(np.array(differences) / 100) == pytest.approx(expected)


def test_p_counts_ties_of_accuracies_that_floating_point_would_part(tmp_path, capsys):
    gained = [5, 1, -4, 2, -4, -3]
    records = [fake(seed, lam, (250 + (lam > 0) * gained[seed]) / 436, test_size=436)
               for seed in range(6) for lam in (0, 0.9)]
    assert rows(capsys, write(tmp_path, *records))[1]["p"] == "0.812"  # 52 of 64 flips


def test_holm():
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert evaluate.holm([]) == []


def test_settings_are_rows_of_their_own_and_what_differs_is_a_column(tmp_path, capsys):
    records = [fake(s, lam, 0.8, shots=n, noise=noise, noise_level=0.1 if noise else None)
               for s in (0, 1) for lam in (0, 0.9) for n in (20, 100) for noise in (None, "label")]
    table = rows(capsys, write(tmp_path, *records))
    assert len(table) == 8
    settings = {(row["shots"], row["noise"], row["n"]) for row in table}
    assert settings == set(itertools.product(("20", "100"), ("", "label"), ("2",)))


def test_a_rate_that_differs_between_the_arms_is_said(tmp_path, capsys):
    rates = {0: {"lr": 2e-5, "head_lr": 2e-5}, 0.9: {}}
    records = [fake(s, lam, 0.8, **rates[lam]) for s in (0, 1) for lam in rates]
    ce, scl = rows(capsys, write(tmp_path, *records))
    assert (ce["lr"], scl["lr"]) == ("2e-05", "1e-05") and "head_lr" not in ce


def test_missing_pairs_are_said(tmp_path, capsys):
    records = [fake(s, 0, 0.8) for s in range(4)] + [fake(s, 0.9, 0.8 + s / 100) for s in (1, 2, 9)]
    _, scl = rows(capsys, write(tmp_path, *records))
    assert scl["note"] == "2 pairs" and scl["minus CE [95 %]"].startswith("+1.5 ")


@pytest.mark.parametrize("records, message", [
    ([fake(0, 0, 0.8), fake(0, 0, 0.8)], "seed 0 is there twice for sst2, N = 20, CE; keep one"),
    ([fake(0, 0.9, 0.8), fake(1, 0.9, 0.8, lr=1e-4)], "sst2, N = 20, CE + SCL (0.9, 0.3) mixes lr 1e-05 and 0.0001"),
    ([fake(0, 0.9, 0.8), fake(1, 0.9, 0.8, steps=9)], "mixes steps 200 and 9"),
    ([fake(0, 0, 0.8), fake(0, 0.9, 0.8, test_checksum="u")], "mixes test_checksum t and u"),
    ([fake(0, 0, 0.8), fake(0, 0.9, 0.8, train_checksum="u")], "(0.9, 0.3) saw different train sets at seed 0"),
    ([{"run": "a", "task": "sst2"}], "holds a line without shots: no record of a run"),
    ([{n: v for n, v in fake(0, 0, 0.8).items() if n != "test_accuracy"}], "holds a line without test_accuracy"),
    ([], "no record in"),
])  # fmt: skip
def test_what_must_not_be_averaged_is_refused(tmp_path, capsys, records, message):
    assert evaluate.main(["table", str(write(tmp_path, *records))]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_duplicates_over_two_files_are_refused(tmp_path, capsys):
    files = [str(write(tmp_path, fake(0, 0, 0.8), name=name)) for name in ("a.jsonl", "b.jsonl")]
    assert evaluate.main(["table", *files]) == 2
    assert "twice" in capsys.readouterr().err


def test_one_run_in_two_files_counts_once(tmp_path, capsys):
    records = [fake(seed, 0, 0.8) for seed in range(3)]
    files = [write(tmp_path, *records[:2], name="a.jsonl"), write(tmp_path, *records, name="b.jsonl")]
    assert [row["n"] for row in rows(capsys, *files)] == ["3"]


def test_the_papers_number_stands_beside_its_own_setting_and_method(tmp_path, capsys):
    arms = [{}, {"lam": 0.9, "tau": 0.3}, {"lam": 0.9, "tau": 0.5}, {"ce_temperature": 0.3}]
    noises = [{}, {"noise": "label", "noise_level": 0.3},
              {"noise": "backtranslation", "noise_level": 0.3, "translators": ["a", "b"]}, {"batch_size": 64}]
    records = [fake(s, 0, 0.8) | arm | noise for s in (0, 1) for noise in noises for arm in arms]
    table = rows(capsys, write(tmp_path, *(record | {"shots": 100} for record in records)))
    beside = [row["paper"] for row in table]
    assert beside == ["91.1 ± 1.3", "", "92.8 ± 1.3", "", *[""] * 4, "92.0 ± 1.3", "", "92.6 ± 0.9", "", *[""] * 4]
    assert [row["method"] for row in table[:2]] == ["CE", "CE on normalised features (0.3)"]
    assert table[1]["minus CE [95 %]"] == "+0.0 [+0.0, +0.0]"  # a method of its own, never the baseline


def test_the_papers_transfer_stands_beside_transfer(tmp_path, capsys):
    models = ("all-MiniLM-L6-v2", "runs/sst2-n60-lam0-seed0-0a1b2c")
    records = [fake(0, 0, 0.8, task="amazon_polarity", shots=None, shots_per_class=20, model=model) for model in models]
    assert [row["paper"] for row in rows(capsys, write(tmp_path, *records))] == ["", "87.4 ± 6.4"]


def test_noise_is_compared_with_the_same_method_without(tmp_path, capsys):
    lost = {0: [0.10, 0.12], 0.9: [0.03, 0.05]}
    clean = [fake(seed, lam, 0.8) for lam in lost for seed in (0, 1)]
    noisy = [fake(seed, lam, 0.8 - lost[lam][seed], noise="label", noise_level=0.1, train_checksum="other")
             for lam in lost for seed in (0, 1)]
    table = rows(capsys, write(tmp_path, *clean, *noisy))
    assert [row["minus clean [95 %]"] for row in table] == ["", "", "-11.0 [-23.7, +1.7]", "-4.0 [-16.7, +8.7]"]


def test_two_arms_that_go_on_from_checkpoints_of_their_own_are_pairs(tmp_path, capsys):
    models = {0: "runs/sst2-n60-lam0-seed0-0a1b2c", 0.9: "runs/sst2-n60-lam0.9-tau0.3-seed0-3d4e5f"}
    records = [fake(seed, lam, 0.8 + lam / 100, model=model) for lam, model in models.items() for seed in (0, 1)]
    _, scl = rows(capsys, write(tmp_path, *records))
    assert scl["minus CE [95 %]"] == "+0.9 [+0.9, +0.9]"


def test_two_models_are_two_settings_whatever_they_are_called(tmp_path, capsys):
    records = [fake(seed, 0, 0.8, model=f"org/x-lambda-{name}") for seed, name in enumerate("ab")]
    assert [row["n"] for row in rows(capsys, write(tmp_path, *records))] == ["1", "1"]


def test_a_missing_file(capsys):
    assert evaluate.main(["table", "nowhere.jsonl"]) == 2
    assert "no file nowhere.jsonl" in capsys.readouterr().err


# ------------------------------------------------------------ score, tsne, grid


def test_cosines_equal_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 4)), np.arange(30) % 3
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [(labels[i] == labels[j], z[i] @ z[j]) for i, j in itertools.combinations(range(30), 2)]
    expected = [np.mean([cosine for same, cosine in pairs if same == wanted]) for wanted in (True, False)]
    assert evaluate.cosines(features, labels) == pytest.approx(expected)


def test_score_repeats_the_record(pair, capsys):
    out, records = pair
    summary, *confusions = tables(capsys, "score", *(out / record["run"] for record in records[:2]))
    for record, row, confusion in zip(records, summary, confusions, strict=False):
        assert row["run"] == record["run"] and row["test examples"] == "300"
        for column, name in (("accuracy", "test_accuracy"), ("macro-F1", "test_macro_f1"), ("MCC", "test_mcc")):
            assert row[column] == f"{record[name]:.4f}"
        counts = np.array([list(line.values())[1:] for line in confusion], dtype=int)
        assert counts.sum() == 300 and counts.trace() / 300 == pytest.approx(record["test_accuracy"])
        assert -1 <= float(row["silhouette"]) <= 1 and float(row["cosine within a class"]) <= 1


def test_score_gives_the_mean_over_seeds(pair, capsys):
    out, records = pair
    runs = [record for record in records if record["lam"] == 0 or record["tau"] == 0.3]
    _, means, *_ = tables(capsys, "score", *(out / record["run"] for record in runs))
    assert [(row["runs"], row["n"]) for row in means] == [("demo-n20-lam0", "2"), ("demo-n20-lam0.9-tau0.3", "2")]
    accuracies = [record["test_accuracy"] for record in runs if record["lam"] == 0]
    assert means[0]["accuracy"] == f"{np.mean(accuracies):.3f} ± {np.std(accuracies, ddof=1):.3f}"


def test_score_on_another_task(checkpoints, own, capsys):
    rows = [("on friday evening the plot was great .", 1), ("on friday evening the plot was dull .", 0)]
    task = own(train=[("so great", 1), ("so dull", 0)], test=rows * 2)
    for folder in checkpoints.values():
        summary, _ = tables(capsys, "score", folder, "--task", task)
        assert summary[0]["accuracy"] == "1.0000"


def test_score_goes_by_the_names_of_the_labels_not_their_order(own, tmp_path, capsys):
    """A checkpoint whose classes are numbered the other way round gives every answer the other way round."""
    great, dull = "on friday evening the plot was great .", "on friday evening the plot was dull ."
    train = [(f"{text} {i}", label) for i in range(20) for text, label in ((great, "b"), (dull, "a"))]
    out = tmp_path / "out"
    flags = ["--model", "demo", "--shots", "30", "--max-steps", "40", "--out", str(out)]
    assert finetune.main(["--task", str(own(train=train, test=train[:4])), *flags]) == 0
    (record,) = read_records(out / "results.jsonl")
    config = out / record["run"] / "config.json"
    config.write_text(config.read_text().replace('"0": "a"', '"0": "b"').replace('"1": "b"', '"1": "a"'))
    summary, _ = tables(capsys, "score", out / record["run"])
    assert summary[0]["accuracy"] == f"{1 - record['test_accuracy']:.4f}"


def test_score_refuses_classes_of_other_names(checkpoints, own, capsys):
    folder = own(train=[("c", "red"), ("d", "blue")] * 3, test=[("a", "red"), ("b", "blue")])
    assert evaluate.main(["score", str(checkpoints["cls"]), "--task", str(folder)]) == 2
    assert "knows the classes negative, positive, not blue, red" in capsys.readouterr().err


def test_score_of_one_class_and_of_a_broken_checkpoint(checkpoints, own, tmp_path, capsys):
    folder = own(train=[("so dull", 0), ("great", 1)], test=[("a great plot", 1), ("a fresh cast", 1)])
    summary, _ = tables(capsys, "score", checkpoints["cls"], "--task", folder)
    assert summary[0]["silhouette"] == "nan"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_text('{"run": "de')
    assert evaluate.main(["score", str(tmp_path / "broken")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_tsne_draws_a_panel_a_run(pair, tmp_path):
    out, records = pair
    figure = tmp_path / "tsne.png"
    assert evaluate.main(["tsne", *(str(out / record["run"]) for record in records[:2]), "-o", str(figure)]) == 0
    height, width, _ = matplotlib.image.imread(figure).shape
    assert width > 1.6 * height


def test_tsne_of_many_runs_goes_in_pairs(pair, monkeypatch):
    out, records = pair
    drawn = []
    monkeypatch.setattr(evaluate, "save", lambda figure, output: drawn.append(figure))
    assert evaluate.main(["tsne", *([str(out / records[0]["run"])] * 5), "-o", "tsne.png"]) == 0
    visible = [panel for panel in drawn[0].axes if panel.axison]
    assert len(drawn[0].axes) == 6 and len(visible) == 5
    assert len({panel.get_xlim() for panel in visible}) == 1  # one scale


def test_grid_draws_the_means(pair, tmp_path, monkeypatch):
    out, records = pair
    drawn = []
    monkeypatch.setattr(evaluate, "save", lambda figure, output: drawn.append(figure))
    assert evaluate.main(["grid", str(out / "results.jsonl"), "-o", "grid.png"]) == 0
    panel = drawn[0].axes[0]
    cells = [text.get_text() for text in panel.texts]
    expected = [np.mean([100 * r["validation_accuracy"] for r in records if r["tau"] == tau]) for tau in (0.3, 0.5)]
    assert cells == [f"{mean:.1f}" for mean in expected]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.3", "0.5"]
    assert "mean of 2 seeds; CE" in panel.get_title()


@pytest.mark.parametrize("argv, message", [
    (["score", "nowhere"], "nowhere is no checkpoint of finetune.py"),
    (["grid", "nowhere.jsonl", "-o", "x.png"], "no file nowhere.jsonl"),
    (["dance"], "invalid choice: 'dance'"),
    (["tsne", "runs"], "the following arguments are required: -o"),
])  # fmt: skip
def test_mistakes(capsys, argv, message):
    try:
        status = evaluate.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err and captured.err.count("\n") == 1


def test_a_grid_gives_ce_over_the_seeds_of_its_cells(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "save", lambda figure, output: drawn.append(figure))
    records = [fake(seed, 0, 0.8, validation) for seed, validation in enumerate((0.6, 0.7, 0.9, 0.9))]
    file = write(tmp_path, *records, *(fake(seed, 0.9, 0.8) for seed in (0, 1)))
    assert evaluate.main(["grid", str(file), "-o", "grid.png"]) == 0
    assert drawn[0].axes[0].get_title().endswith("mean of 2 seeds; CE 65.0")


def test_a_grid_of_two_settings_is_refused(tmp_path, capsys):
    file = write(tmp_path, fake(0, 0.9, 0.8), fake(0, 0.9, 0.8, shots=100))
    assert evaluate.main(["grid", str(file), "-o", str(tmp_path / "x.png")]) == 2
    assert "these mix shots 20 and 100" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_a_picture_that_cannot_be_written(pair, tmp_path, capsys):
    out, _ = pair
    for figure in ("no/x.png", "x.nonsense"):
        try:
            status = evaluate.main(["grid", str(out / "results.jsonl"), "-o", str(tmp_path / figure)])
        except SystemExit as stop:
            status = stop.code
        assert status == 2 and "argument -o" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
