"""eval.py: its statistics against definitions, its pictures by what they show, every command on real records."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import run, write_lines
from safetensors.torch import load_file, save_file

import eval as evaluate
import finetune
from data import Split, read_records


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """CE and CE + SCL for two seeds, with checkpoints."""
    out = tmp_path_factory.mktemp("pair")
    records = run(out, "--shots", 20, "--lam", 0, 0.9, "--tau", 0.3, 0.5, "--seed", 0, 1, "--save")
    return out, records


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(evaluate, "save", lambda figure, *_: figures.append(figure))
    return figures


RUNS = itertools.count()


def fake(seed, lam, test, validation=0.5, **other):
    """A record of no run."""
    return {
        "run": f"run{next(RUNS)}", "task": "sst2", "shots": 20, "shots_per_class": None, "model": "encoder",
        "pooling": "cls", "noise": None, "noise_level": None, "translators": None, "batch_size": 16,
        "sampler": "shuffled", "precision": "fp32", "dropout": 0.1, "max_length": 256, "weight_decay": 0.1,
        "warmup_ratio": 0.06, "lr": 1e-5, "head_lr": 1e-5, "steps": 200, "eval_every": 20, "lam": lam,
        "tau": 0.3 if lam else None, "ce_temperature": None, "seed": seed, "data_dir": None,
        "train_checksum": f"{seed}", "validation_checksum": f"{seed}", "test_checksum": "t", "test_size": 400,
        "validation_accuracy": validation, "test_accuracy": test, "seconds": 60, "device": "cpu", "python": "3",
        "torch": "2", "transformers": "5", "commit": None,
    } | other  # fmt: skip


def write(tmp_path, *records, name="results.jsonl"):
    write_lines(tmp_path / name, map(json.dumps, records))
    return tmp_path / name


def pairs(gains, ce=0.8, **other):
    """CE, and CE + SCL (0.9, 0.3) that gains so much on it, seed by seed."""
    return [fake(seed, lam, ce + gain * (lam > 0), **other) for seed, gain in enumerate(gains) for lam in (0, 0.9)]


def status(*argv):
    try:
        return evaluate.main(list(map(str, argv)))
    except SystemExit as stop:
        return stop.code


def mistake(capsys, *argv):
    """The one line of a command that must fail."""
    assert status(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("eval.py: error: ") and captured.err.count("\n") == 1 and not captured.out
    return captured.err


def tables(capsys, command, *argv):
    """What a command prints: its markdown tables as lists of dicts."""
    assert status(command, *argv) == 0
    blocks = itertools.groupby(capsys.readouterr().out.splitlines(), lambda line: line.startswith("|"))
    cells = [[[cell.strip() for cell in line[2:-2].split(" | ")] for line in block] for table, block in blocks if table]
    return [[dict(zip(header, line, strict=True)) for line in body] for header, _, *body in cells]


def rows(capsys, *files):
    (table,) = tables(capsys, "table", *files)
    return table


# ------------------------------------------------------------ table


def test_table_mean_std_and_paired_difference(tmp_path, capsys):
    ce, scl = [0.80, 0.82, 0.87], [0.84, 0.83, 0.88]
    records = [fake(seed, lam, test, test / 2)
               for lam, tests in ((0, ce), (0.9, scl)) for seed, test in enumerate(tests)]
    first, second = rows(capsys, write(tmp_path, *records))
    assert (first["method"], first["all seeds"], first["n"]) == ("CE", "83.0 ± 3.6", "3")  # sample std: 3.606
    assert (second["method"], second["all seeds"]) == ("CE + SCL (0.9, 0.3)", "85.0 ± 2.6")
    assert second["minus CE [95 %]"] == "+2.0 [-2.3, +6.3]"  # 4, 1, 1: std 1.732, t(2) 4.303
    assert second["on validation [95 %]"] == "+1.0 [-1.2, +3.2]"  # half of it
    assert first["minus CE [95 %]"] == "" and "top 3 by validation" not in second
    assert first["test s.e."] == "1.9"  # sqrt(.83 .17 / 400)


def test_one_seed_has_no_interval_and_says_so(tmp_path, capsys):
    _, second = rows(capsys, write(tmp_path, fake(0, 0, 0.8), fake(0, 0.9, 0.9)))
    assert second["all seeds"] == "90.0" and second["minus CE [95 %]"] == "+10.0 (too few seeds)"


@pytest.mark.parametrize("validation", [
    [0.9, 0.8, 0.7, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.9, 0.8, 0.8, 0.8, 0.8, 0, 0, 0, 0, 0], [0.5] * 10,
    [0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
])  # fmt: skip
def test_top_three_by_validation_is_over_every_choice_among_ties(validation):
    test = np.random.default_rng(0).uniform(0.5, 1, 10)
    arm = {seed: fake(seed, 0, test[seed], validation[seed]) for seed in range(10)}
    order = sorted(validation)
    choices = [list(three) for three in itertools.combinations(range(10), 3)
               if sorted(validation[i] for i in three) == order[-3:]]
    mean, std = evaluate.top_three(arm)
    assert mean == pytest.approx(np.mean([test[three].mean() for three in choices]))
    assert std == pytest.approx(np.mean([test[three].var(ddof=1) for three in choices]) ** 0.5)


def test_top_three_of_five_hundred_that_all_tie():
    """A random three of them: their mean and their sample variance are expected."""
    test = np.random.default_rng(0).uniform(0.5, 1, 500)
    arm = {seed: fake(seed, 0, accuracy, 0.5) for seed, accuracy in enumerate(test)}
    assert evaluate.top_three(arm) == pytest.approx((test.mean(), test.std(ddof=1)))


def test_top_three_needs_ten_seeds(tmp_path, capsys):
    def both(n):
        records = (fake(s, lam, 0.8 + (s + lam) / 100, s / 100) for lam in (0, 0.9) for s in range(n))
        return rows(capsys, write(tmp_path, *records))[1]

    assert "top 3 by validation" not in both(9)
    assert both(10)["top 3 by validation"] == "88.9 ± 1.0"


def test_the_test_sets_own_error_of_the_difference(tmp_path, capsys):
    """One seed: McNemar's, from the examples that only one of the two has right. Two seeds alike: the same."""
    rng = np.random.default_rng(0)
    ce, scl = rng.random((2, 403)) < [[0.6], [0.7]]
    only_ce, only_scl = (ce & ~scl).sum(), (scl & ~ce).sum()
    expected = (only_ce + only_scl - (only_scl - only_ce) ** 2 / 403) ** 0.5 / 403
    records = [fake(seed, lam, right.mean(), test_size=403, test_correct=np.packbits(right).tobytes().hex())
               for seed in (0, 1) for lam, right in ((0, ce), (0.9, scl))]
    for some in (records[:2], records):
        assert rows(capsys, write(tmp_path, *some))[1]["its test s.e."] == f"{100 * expected:.1f}"
    del records[0]["test_correct"]  # an old one
    assert "its test s.e." not in rows(capsys, write(tmp_path, *records))[1]


@pytest.mark.parametrize("digits", ["ff", "zz" * 50, 7, ["ff"], "ff" * 49 + "f"])
def test_answers_that_are_none_are_refused(tmp_path, capsys, digits):
    records = [fake(0, lam, 0.8, test_correct=digits) for lam in (0, 0.9)]
    assert "test_correct of run" in mistake(capsys, "table", write(tmp_path, *records))


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


def test_the_papers_gain_stands_beside_its_own_setting_and_method(tmp_path, capsys):
    arms = [{}, {"lam": 0.9, "tau": 0.3}, {"lam": 0.9, "tau": 0.5}, {"ce_temperature": 0.3}]
    noises = [{}, {"noise": "label", "noise_level": 0.3},
              {"noise": "backtranslation", "noise_level": 0.3, "translators": ["a", "b"]}, {"batch_size": 64}]
    records = [fake(s, 0, 0.8) | arm | noise for s in (0, 1) for noise in noises for arm in arms]
    table = rows(capsys, write(tmp_path, *(record | {"shots": 100} for record in records)))
    gains = {(row["noise"], row["batch_size"], row["method"]): row["paper's gain"] for row in table}
    assert {key: gain for key, gain in gains.items() if gain} == {
        ("", "16", "CE + SCL (0.9, 0.3)"): "+1.7", ("backtranslation", "16", "CE + SCL (0.9, 0.3)"): "+0.6"}
    assert [row["method"] for row in table[:2]] == ["CE", "CE on normalised features (0.3)"]
    assert table[1]["minus CE [95 %]"] == "+0.0 [+0.0, +0.0]"  # a method of its own, never the baseline


def test_the_papers_transfer_stands_beside_transfer(tmp_path, capsys):
    models = ("all-MiniLM-L6-v2", "runs/sst2-n60-lam{}-seed0-0a1b2c")
    records = [fake(0, lam, 0.8, task="amazon_polarity", shots=None, shots_per_class=20,
                    model=model.format("0.9-tau0.3" if lam else 0)) for model in models for lam in (0, 0.9)]
    assert [row["paper's gain"] for row in rows(capsys, write(tmp_path, *records))] == ["", "", "", "+2.9"]


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


def test_a_folder_goes_by_its_name(tmp_path, capsys):
    records = [fake(0, 0, 0.8, model=model) for model in ("/home/me/small", "org/x-lambda-b")]
    assert [row["model"] for row in rows(capsys, write(tmp_path, *records))] == ["small", "x-lambda-b"]
    (row,) = rows(capsys, write(tmp_path, fake(0, 0, 0.8, task="/home/me/reviews")))
    assert row["task"] == "reviews"
    records = [fake(0, lam, 0.8, task="my/sst2") for lam in (0, 0.9)]  # not the paper's
    assert "paper's gain" not in rows(capsys, write(tmp_path, *records))[1]


def test_text_in_a_record_cannot_break_a_table_or_a_terminal(tmp_path, capsys):
    (row,) = rows(capsys, write(tmp_path, fake(0, 0, 0.8, task="a|b\n\x1b[31mc")))
    assert row["task"] == r"a\|b\n\x1b[31mc"


@pytest.mark.parametrize("redirection", ["", ">&-"])
def test_a_terminal_that_knows_ascii_alone_and_none_at_all(tmp_path, redirection):
    file = write(tmp_path, *pairs([0.1, 0.2], task="schön"))
    command = f"{sys.executable} {evaluate.__file__} table {file} {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr
    assert redirection or r"| sch\xf6n |" in done.stdout


# ------------------------------------------------------------ the mean over settings


def test_the_pooled_interval_of_one_setting_is_students():
    differences = {0: 0.1, 1: 0.4, 2: -0.7, 3: 1.1, 4: 1.9, 5: 0.35}
    assert evaluate.pooled([("sst2", differences)]) == pytest.approx(evaluate.t_interval(differences))


def test_a_second_setting_of_the_same_seeds_is_no_second_witness_but_another_task_is():
    differences = dict(enumerate((0.1, 0.4, -0.7, 1.1, 1.9, 0.35, -0.2, 0.8)))
    alone = evaluate.pooled([("sst2", differences)])
    assert evaluate.pooled([("sst2", differences), ("sst2", dict(differences))]) == pytest.approx(alone)
    _, low, high = evaluate.pooled([("sst2", differences), ("qnli", differences)])
    narrower = scipy.stats.t.ppf(0.975, 14) / scipy.stats.t.ppf(0.975, 7) / 2**0.5
    assert high - low == pytest.approx(narrower * (alone[2] - alone[1]))
    assert np.isnan(evaluate.pooled([("sst2", differences), ("qnli", dict(enumerate((0.1, 0.5, 0.2, 0.3))))])[1])


def test_the_pooled_interval_holds_the_truth_as_often_as_it_says():
    """Three settings of ten seeds, in each of two tasks; what a seed brings, it brings to all settings of its task."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        draws = 0.7 * rng.normal(size=(2, 1, 10)) + rng.normal(size=(2, 3, 10))
        gains = [(str(task), dict(enumerate(setting))) for task, of_task in enumerate(draws) for setting in of_task]
        _, low, high = evaluate.pooled(gains)
        held += low <= 0 <= high
    assert 0.92 <= held / 500 <= 0.98


def test_the_line_below_the_table(tmp_path, capsys):
    """Settings weigh the same, however many their seeds; it counts those that are ahead, and the pairs."""
    few = pairs([0.02, 0.04, -0.01, 0.0, 0.05], shots=100)
    many = pairs([-0.01] * 8 + [0.02, 0.03])
    assert status("table", write(tmp_path, *few, *many)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mean over 2 settings" in line]
    assert line.startswith("CE + SCL (0.9, 0.3) minus CE, mean over 2 settings: +0.9 [")  # 2.0 and -0.3
    assert line.endswith("ahead in 1 of 2 settings and 5 of 15 pairs.")


def test_the_line_below_the_table_has_no_interval_with_few_seeds(tmp_path, capsys):
    assert status("table", write(tmp_path, *pairs([0.02] * 4), *pairs([0.01] * 4, shots=100))) == 0
    assert "mean over 2 settings: +1.5 (too few seeds); ahead" in capsys.readouterr().out


def test_one_setting_has_no_line_below_the_table(tmp_path, capsys):
    assert status("table", write(tmp_path, *pairs([0.02] * 6))) == 0
    assert "mean over" not in capsys.readouterr().out


def test_the_evidence_in_one_line(tmp_path, capsys):
    """MiniLM's nine few-shot settings, each as long as its trials chose, as another program computed the mean."""
    results = Path(evaluate.__file__).parent / "results"
    records = [r for r in read_records(results / "few-shot.jsonl") if r["shots"] == 1000]
    records += [r for r in read_records(results / "chosen-steps" / "results.jsonl") if not r["ce_temperature"]]
    assert status("table", write(tmp_path, *records)) == 0
    told = capsys.readouterr().out
    assert "mean over 9 settings: +1.5 [+0.9, +2.1]" in told and "9 of 9 settings and 57 of 75 pairs." in told


# ------------------------------------------------------------ what must not be averaged, and what is no record


@pytest.mark.parametrize("records, message", [
    ([fake(0, 0, 0.8), fake(0, 0, 0.8)], "sst2, N = 20, CE has seed 0 twice, run"),
    ([fake(0, 0.9, 0.8), fake(1, 0.9, 0.8, lr=1e-4)], "CE + SCL (0.9, 0.3) mixes lr 1e-05"),
    ([fake(0, 0.9, 0.8), fake(1, 0.9, 0.8, steps=9)], "mixes steps 200"),
    ([fake(0, 0, 0.8), fake(0, 0.9, 0.8, test_checksum="u")], "mixes test_checksum t"),
    ([fake(0, 0, 0.8), fake(0, 0.9, 0.8, test_size=3)], "mixes test_size 400"),
    ([fake(0, 0, 0.8), fake(0, 0.9, 0.8, train_checksum="u")], "(0.9, 0.3) saw different train sets at seed 0"),
    ([{"run": "a", "task": "sst2"}], "run a is no record of a run: it has no shots"),
    ([{n: v for n, v in fake(0, 0, 0.8).items() if n != "test_accuracy"}], "it has no test_accuracy"),
    ([fake(0, 0, 0.8, tau=0.3)], "lam comes with tau"),
    ([fake(0, 0, 0.8, noise="label")], "noise with noise_level"),
    ([], "no record in"),
])  # fmt: skip
def test_what_must_not_be_averaged_is_refused(tmp_path, capsys, records, message):
    assert message in mistake(capsys, "table", write(tmp_path, *records))


def test_the_way_out_of_a_mixture_works(tmp_path, capsys):
    files = [write(tmp_path, *pairs([0.1], steps=steps), name=f"{steps}.jsonl") for steps in (100, 200)]
    *_, command = mistake(capsys, "table", *files).strip().split("pick one: ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert len(rows(capsys, tmp_path / "one.jsonl")) == 2


def test_a_folder_stands_for_the_records_in_it(tmp_path, capsys):
    write(tmp_path, *pairs([0.1, 0.2]))
    assert len(rows(capsys, tmp_path)) == 2


def test_a_run_that_was_made_anew_with_another_result_is_refused(tmp_path, capsys):
    files = [write(tmp_path, fake(0, 0, accuracy, run="same"), name=f"{accuracy}.jsonl") for accuracy in (0.8, 0.9)]
    assert "has seed 0 twice" in mistake(capsys, "table", *files)


def test_a_checkpoint_named_with_a_slash_at_its_end_is_the_same(tmp_path, capsys):
    names = {0: "runs/sst2-n60-lam0-seed0-abc123/", 0.9: "runs/sst2-n60-lam0.9-tau0.3-seed0-abc124"}
    records = [fake(seed, lam, 0.8 + lam / 10, model=name) for seed in (0, 1) for lam, name in names.items()]
    assert rows(capsys, write(tmp_path, *records))[1]["minus CE [95 %]"] == "+9.0 [+9.0, +9.0]"
    one = [record | {"model": "encoder/"} for record in pairs([0.1])]
    assert [kind for kind, *_ in evaluate.read_effects([str(write(tmp_path, *one))])] == [""]  # no transfer


def test_one_run_in_two_files_counts_once_and_two_of_one_seed_are_refused(tmp_path, capsys):
    records = [fake(seed, 0, 0.8) for seed in range(3)]
    files = [write(tmp_path, *records[:2], name="a.jsonl"), write(tmp_path, *records, name="b.jsonl")]
    assert [row["n"] for row in rows(capsys, *files)] == ["3"]
    assert "twice" in mistake(capsys, "table", *files, write(tmp_path, fake(0, 0, 0.8), name="c.jsonl"))


JUNK = (None, True, "0.8", "", -1, 0, 2.5, 1e300, float("nan"), float("inf"), 10**400, [], ["a"], {}, "x\ud800\n", [[]])


@pytest.mark.parametrize("field", [*evaluate.FIELDS, "test_correct"])
def test_a_record_with_anything_in_a_field_is_read_or_refused_in_one_line(tmp_path, capsys, field):
    for junk in JUNK:
        records = pairs([0.1, 0.2])
        records[-1][field] = junk
        code = status("table", write(tmp_path, *records))
        captured = capsys.readouterr()
        left_out = field == "run" and not isinstance(junk, str)  # such a line is said and left out
        assert code in (0, 2) and captured.err.count("\n") == (code == 2 or left_out)
        assert bool(captured.out) == (code == 0)


@pytest.mark.parametrize("field, value, message", [
    ("test_accuracy", 1.5, "test_accuracy is 1.5, expected fraction"),
    ("validation_accuracy", float("nan"), "validation_accuracy is nan, expected fraction"),
    ("lam", "0.9", "lam is '0.9', expected fraction"),
    ("model", ["a"], "model is a list, expected text"),
    ("steps", 2.5, "steps is 2.5, expected count"),
    ("translators", ["a"], "translators is a list, expected two texts or null"),
])  # fmt: skip
@pytest.mark.parametrize("command", [["table"], ["grid", "-o", "x.png"], ["effects", "-o", "x.png"]])
def test_the_file_the_run_the_field_and_what_came(tmp_path, capsys, command, field, value, message):
    file = write(tmp_path, fake(0, 0.9, 0.8, run="mine") | {field: value})
    told = mistake(capsys, *command, file)
    assert message in told and "run mine is no record" in told and "results.jsonl" in told


@pytest.mark.parametrize("command", [["table"], ["grid", "-o", "x.png"], ["effects", "-o", "x.png"]])
@pytest.mark.parametrize("name", ["nowhere.jsonl", "x" * 300, "no\x1b/where"])
def test_a_missing_file(capsys, command, name):
    told = mistake(capsys, *command, name)
    assert "no file" in told and "\x1b" not in told


def test_records_are_read_without_torch(tmp_path):
    file = write(tmp_path, *pairs([0.1, 0.2]))
    code = (f"import sys, eval; assert eval.main(['table', {str(file)!r}]) == 0; "
            "print({'torch', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules))")
    root = Path(evaluate.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr


# ------------------------------------------------------------ effects


def labels_of(figure):
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def marks(figure, label):
    """(x, y) of every mark of this kind."""
    lines = [line for line in figure.axes[0].lines if line.get_label() == label]
    return [(x, y) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_effects_shows_each_setting_with_its_seeds_mean_and_the_papers(tmp_path, drawn):
    gains = [0.01, 0.03, -0.02, 0.04, 0.05]
    file = write(tmp_path, *pairs(gains), *pairs(gains[:3], task="qnli"), *pairs([0.02], shots=1000))
    assert status("effects", file, "-o", "x.png") == 0
    (figure,) = drawn
    assert labels_of(figure) == ["N = 20: encoder", "qnli", "sst2", "mean of these 2", "N = 1000: encoder", "sst2"]
    squares = marks(figure, "mean of the seeds, 95 % interval")
    assert squares == [(pytest.approx(2 / 3), 1), (pytest.approx(2.2), 2), (pytest.approx(2), 5)]
    assert marks(figure, "mean of the group, 95 % interval") == [(pytest.approx((2 / 3 + 2.2) / 2), 3)]
    assert sorted(x for x, y in marks(figure, "a seed") if 2 < y < 3) == pytest.approx(sorted(100 * x for x in gains))
    assert marks(figure, "the paper's, RoBERTa-Large") == [
        (pytest.approx(10.7), 1), (pytest.approx(2.2), 2), (pytest.approx(0.1), 5)]
    low, high = scipy.stats.t.interval(0.95, 4, 2.2, scipy.stats.sem(100 * np.array(gains)))
    lines = [line.get_xdata() for line in figure.axes[0].lines]
    assert any(ends == pytest.approx([low, high]) for ends in lines if len(ends) == 2)
    assert f"+2.2 [{low:+.1f}, {high:+.1f}]" in [text.get_text() for text in figure.axes[0].texts]
    assert "+2.0 (too few seeds)" in [text.get_text() for text in figure.axes[0].texts]


def test_effects_reads_each_file_by_itself_and_counts_a_run_once(tmp_path, drawn):
    short, long = pairs([0.01, 0.02], steps=100, eval_every=10), pairs([0.03, 0.05])
    mixed = [short[0], long[1], short[2], long[3]]  # CE at 100 steps, CE + SCL at 200
    files = [write(tmp_path, *records, name=name) for records, name in (
        (mixed, "few-shot.jsonl"), (mixed[:2], "again.jsonl"), (long, "same-length.jsonl"))]
    assert status("effects", *files, "-o", "x.png") == 0
    assert labels_of(drawn[0]) == ["N = 20: encoder", "sst2, steps 100 / 200", "sst2, steps 200", "mean of these 2"]
    assert len(marks(drawn[0], "a seed")) == 4


def test_effects_has_groups_for_shots_noise_and_transfer(tmp_path, drawn):
    checkpoint = "runs/sst2-n60-lam0-seed0-0a1b2c"
    records = [*pairs([0.1], noise="word", noise_level=0.3), *pairs([0.1], model=checkpoint), *pairs([0.1], shots=None),
               *pairs([0.1], shots=100), *pairs([0.1], shots=100, pooling="mean"), *pairs([0.1], shots=100, task="rte")]
    assert status("effects", write(tmp_path, *records), "-o", "x.png") == 0
    assert labels_of(drawn[0]) == [
        "N = 100: encoder", "rte", "sst2", "sst2, pooling mean", "mean of these 3", "all of train: encoder", "sst2",
        "noise: encoder", "sst2, word 0.3", "transfer: sst2-n60", "sst2"]


def test_effects_of_all_the_evidence(tmp_path):
    results = Path(evaluate.__file__).parent / "results"
    figure = tmp_path / "effects.png"
    assert status("effects", *results.glob("*.jsonl"), "-o", figure) == 0
    height, width, _ = matplotlib.image.imread(figure).shape
    assert 900 <= width <= 1800 and height > width / 2


def test_effects_without_a_pair(tmp_path, capsys):
    told = mistake(capsys, "effects", write(tmp_path, fake(0, 0, 0.8), fake(1, 0.9, 0.8)), "-o", tmp_path / "x.png")
    assert "no seed has both --lam 0 and --lam 0.9 --tau 0.3" in told and not (tmp_path / "x.png").exists()


# ------------------------------------------------------------ grid


def test_grid_draws_the_means_with_their_spread_around_ce(pair, drawn):
    out, records = pair
    assert status("grid", out / "results.jsonl", "-o", "grid.png") == 0
    panel, bar = drawn[0].axes
    of_tau = [[100 * r["validation_accuracy"] for r in records if r["tau"] == tau] for tau in (0.3, 0.5)]
    assert [text.get_text() for text in panel.texts] == [f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f}" for x in of_tau]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.3", "0.5"]
    ce = np.mean([100 * r["validation_accuracy"] for r in records if not r["lam"]])
    assert panel.images[0].get_array().ravel().tolist() == pytest.approx([np.mean(x) - ce for x in of_tau])
    low, high = panel.images[0].get_clim()
    assert low == -high and bar.get_ylabel() == f"points above CE, {ce:.1f}" and "n = 2" in panel.get_title()


def test_half_a_point_is_no_full_scale_of_colours(tmp_path, drawn):
    records = [fake(0, 0, 0.8, 0.7), fake(0, 0.9, 0.8, 0.705), fake(0, 0.5, 0.8, 0.695)]
    assert status("grid", write(tmp_path, *records), "-o", "x.png") == 0
    assert drawn[0].axes[0].images[0].get_clim() == (-2, 2)


def test_a_grid_gives_ce_over_the_seeds_of_its_cells(tmp_path, drawn):
    records = [fake(seed, 0, 0.8, validation) for seed, validation in enumerate((0.6, 0.7, 0.9, 0.9))]
    file = write(tmp_path, *records, *(fake(seed, 0.9, 0.8) for seed in (0, 1)))
    assert status("grid", file, "-o", "grid.png") == 0
    assert drawn[0].axes[1].get_ylabel() == "points above CE, 65.0"


def test_a_grid_without_ce_is_around_its_mean(tmp_path, drawn):
    records = [fake(0, 0, 0.8), fake(1, 0.9, 0.8, 0.7), fake(1, 0.5, 0.8, 0.6)]  # CE of another seed
    assert status("grid", write(tmp_path, *records), "-o", "grid.png") == 0
    assert drawn[0].axes[1].get_ylabel() == "points above the mean of all cells, 65.0"


@pytest.mark.parametrize("records, message", [
    ([fake(0, 0.9, 0.8), fake(0, 0.9, 0.8, shots=100)], "mixes shots 20 "),
    ([fake(0, 0.9, 0.8), fake(0, 0.5, 0.8, lr=1e-3)], "CE + SCL (0.5, 0.3) mixes lr 1e-05 "),
    ([fake(0, 0.9, 0.8), fake(0, 0.5, 0.8, steps=9)], "CE + SCL (0.5, 0.3) mixes steps 200 "),
    ([fake(0, 0.9, 0.8), fake(1, 0.9, 0.8), fake(0, 0.5, 0.8)], "CE + SCL (0.5, 0.3) lacks seed 1, "),
    ([fake(0, 0, 0.8)], "no run with --lam above 0"),
])  # fmt: skip
def test_a_grid_that_mixes_is_refused(tmp_path, capsys, records, message):
    assert message in mistake(capsys, "grid", write(tmp_path, *records), "-o", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_grid_of_ten_thousand_cells_is_a_picture_of_some_size(tmp_path):
    cells = itertools.product(range(1, 101), repeat=2)
    file = write(tmp_path, *(fake(0, lam / 100, 0.8, tau=tau / 100) for lam, tau in cells))
    assert status("grid", file, "-o", tmp_path / "grid.png") == 0
    assert matplotlib.image.imread(tmp_path / "grid.png").size < 1e8


# ------------------------------------------------------------ checkpoints


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
        assert row["largest class"] == f"{counts.sum(axis=1).max() / 300:.4f}"
        assert -1 <= float(row["silhouette"]) <= 1 and float(row["cosine within a class"]) <= 1


def test_score_gives_the_mean_over_seeds(pair, capsys):
    out, records = pair
    runs = [record for record in records if record["lam"] == 0 or record["tau"] == 0.3]
    _, means, *_ = tables(capsys, "score", *(out / record["run"] for record in runs))
    assert [(row["runs"], row["n"]) for row in means] == [("demo-n20-lam0", "2"), ("demo-n20-lam0.9-tau0.3", "2")]
    accuracies = [record["test_accuracy"] for record in runs if record["lam"] == 0]
    assert means[0]["accuracy"] == f"{np.mean(accuracies):.3f} ± {np.std(accuracies, ddof=1):.3f}"


def test_score_on_another_task(checkpoints, own, capsys):
    """Its numbers are the checkpoint's classes, by their order."""
    rows = [("on friday evening the plot was great .", 1), ("on friday evening the plot was dull .", 0)]
    task = own(train=[("so great", 1), ("so dull", 0)], test=rows * 2)
    for folder in checkpoints.values():
        summary, confusion = tables(capsys, "score", folder, "--task", task)
        assert (summary[0]["accuracy"], summary[0]["task"]) == ("1.0000", "own")
        assert list(confusion[0])[1:] == ["negative", "positive"]


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
    capsys.readouterr()
    assert status("score", out / record["run"]) == 0
    captured = capsys.readouterr()
    assert f"| {1 - record['test_accuracy']:.4f} |" in captured.out
    assert f"where its record has {record['test_accuracy']:.4f}" in captured.err


def test_score_refuses_classes_of_other_names(checkpoints, own, capsys):
    folder = own(train=[("c", "red"), ("d", "blue")] * 3, test=[("a", "red"), ("b", "blue")])
    told = mistake(capsys, "score", checkpoints["cls"], "--task", folder)
    assert "has no trained classifier for blue, red; its config has negative, positive" in told


def test_score_of_one_class(checkpoints, own, capsys):
    folder = own(train=[("so dull", 0), ("great", 1)], test=[("a great plot", 1), ("a fresh cast", 1)])
    summary, _ = tables(capsys, "score", checkpoints["cls"], "--task", folder)
    assert summary[0]["silhouette"] == summary[0]["MCC"] == summary[0]["between classes"] == "nan"


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A copy of a checkpoint, to be spoilt."""
    return {pooling: Path(shutil.copytree(folder, tmp_path / pooling)) for pooling, folder in checkpoints.items()}


def drop(file, *names):
    save_file({name: weight for name, weight in load_file(file).items() if not name.startswith(names)}, file,
              metadata={"format": "pt"})


def spoil_head(folder):
    file = folder / "head.safetensors"
    save_file({name: torch.full_like(weight, torch.nan) for name, weight in load_file(file).items()}, file)


@pytest.mark.parametrize("pooling, spoil", [
    ("cls", lambda folder: drop(folder / "model.safetensors", "classifier.")),
    ("cls", lambda folder: drop(folder / "model.safetensors", "roberta.encoder.layer.1.")),
    ("mean", lambda folder: (folder / "head.safetensors").unlink()),
    ("mean", spoil_head),
    *[(pooling, lambda folder: [file.unlink() for file in folder.iterdir() if "token" in file.name
                                or file.name in ("vocab.json", "merges.txt")]) for pooling in ("cls", "mean")],
])  # fmt: skip
def test_a_damaged_checkpoint_has_no_score(copy, capsys, pooling, spoil):
    spoil(copy[pooling])
    assert str(copy[pooling]) in mistake(capsys, "score", copy[pooling])


@pytest.mark.parametrize("text", [
    '{"run": "de', "[]", "[[1, 2]]", "null", "7", "{}", "[" * 10**5, '{"run": "a", "task": 7}', "\0", '"x"'])
def test_a_broken_record(copy, capsys, text):
    (copy["cls"] / "record.json").write_text(text)
    assert "record.json" in mistake(capsys, "score", copy["cls"])


@pytest.mark.parametrize("field", evaluate.CHECKPOINT)
def test_a_record_that_lacks_a_field_or_has_another_kind_there(copy, capsys, field):
    file = copy["cls"] / "record.json"
    record = json.loads(file.read_text())
    for spoilt in ({n: v for n, v in record.items() if n != field}, record | {field: [1]}):
        file.write_text(json.dumps(spoilt))
        assert field in mistake(capsys, "score", copy["cls"])


def test_a_record_of_other_data(copy, capsys):
    file = copy["cls"] / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"test_checksum": "other"}))
    assert "was tested on other data" in mistake(capsys, "score", copy["cls"])


@pytest.mark.parametrize("argv, message", [
    (["score", "nowhere"], "nowhere is no checkpoint of finetune.py"),
    (["score", "x" * 300], "is no checkpoint of finetune.py"),
    (["tsne", "no\x1bwhere", "-o", "x.png"], r"no\x1bwhere is no checkpoint"),
    (["dance"], "invalid choice: 'dance'"),
    (["tsne", "runs"], "the following arguments are required: -o"),
    (["tsne", "runs", "-o", "noext"], "noext has no ending"),
    (["tsne", "runs", "-o", "no/x.png"], "no folder no"),
    (["tsne", "runs", "-o", "x" * 300 + "/x.png"], "no folder xxx"),
])  # fmt: skip
def test_mistakes(capsys, argv, message):
    assert message in mistake(capsys, *argv)


def test_a_picture_that_cannot_be_written_leaves_nothing(pair, tmp_path, capsys):
    out, _ = pair
    (tmp_path / "folder.png").mkdir()
    for figure in ("x.nonsense", "folder.png", "x" * 300 + ".png"):
        assert "eval.py: error: " in mistake(capsys, "grid", out / "results.jsonl", "-o", tmp_path / figure)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_what_may_not_be_read(tmp_path, capsys):
    file = write(tmp_path, fake(0, 0, 0.8))
    file.chmod(0)
    assert "results.jsonl" in mistake(capsys, "table", file)


def test_a_working_folder_that_is_gone(tmp_path):
    script = Path(evaluate.__file__)
    for argv in ("table results.jsonl", "grid results.jsonl -o x.png", "score run", "tsne run -o x.png"):
        gone = tmp_path / "gone"
        gone.mkdir()
        command = f"rmdir {gone}; {sys.executable} {script} {argv}"
        done = subprocess.run(command, shell=True, cwd=gone, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "eval.py: error: " in done.stderr


def test_an_interrupt(tmp_path, capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "table", interrupt)
    assert status("table", "x") == 130 and capsys.readouterr().err == "interrupted\n"


# ------------------------------------------------------------ predict


TEXTS = ["on sunday morning the plot felt great !", "the cast was dull .", "fresh"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_predict_gives_class_and_probability_of_each_line(checkpoints, pooling, tmp_path, capsys):
    folder, names = str(checkpoints[pooling]), ("negative", "positive")
    write_lines(tmp_path / "texts", TEXTS)
    assert status("predict", folder, tmp_path / "texts") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    model = finetune.load_model(folder, pooling, names, finetune.load_tokenizer(folder, pooling), 0.0)
    class_logits, _ = finetune.predict(model, Split([(text,) for text in TEXTS], np.zeros(3, int)))
    odds = np.exp(class_logits[:, 1] - class_logits[:, 0].astype(float))  # of positive
    assert [name for name, _ in lines] == [names[int(odd > 1)] for odd in odds]
    assert [float(p) for _, p in lines] == pytest.approx(np.maximum(odds, 1) / (1 + odds), abs=1e-4)


def test_predict_answers_every_line_whatever_program_wrote_it(checkpoints, tmp_path, capsys):
    """A byte-order mark, carriage returns, a line separator within a text; a sign that no tokenizer knows."""
    (tmp_path / "plain").write_bytes("\n".join([*TEXTS, "\U0001f643"]).encode())
    (tmp_path / "other").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*TEXTS, "\U0001f643", ""]).encode())
    (tmp_path / "strange").write_bytes("one\u2028text\rof one line".encode())
    told = []
    for name in ("plain", "other", "strange"):
        assert status("predict", checkpoints["cls"], tmp_path / name) == 0
        told.append(capsys.readouterr().out.splitlines())
    assert told[0] == told[1] and list(map(len, told)) == [4, 4, 1]


def test_predict_reads_standard_input(checkpoints):
    command = [sys.executable, evaluate.__file__, "predict", str(checkpoints["mean"])]
    done = subprocess.run(command, input="\n".join(TEXTS), capture_output=True, text=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()][:2] == ["positive", "negative"], done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("content, message", [
    (b"one\tpair\n", "line 1: expected 1 text(s)"), (b"\xff\xfe", "is not UTF-8"), (None, "cannot be used"),
    (b"", "is empty")])
def test_predict_refuses_what_is_no_text_a_line(checkpoints, tmp_path, capsys, content, message):
    file = tmp_path / "texts"
    if content is not None:
        file.write_bytes(content)
    assert message in mistake(capsys, "predict", checkpoints["cls"], file)


def test_predict_wants_a_pair_where_the_task_has_pairs(copy, tmp_path, capsys):
    record = json.loads((copy["cls"] / "record.json").read_text())
    (copy["cls"] / "record.json").write_text(json.dumps(record | {"num_texts": 2}))
    write_lines(tmp_path / "texts", TEXTS)
    assert "line 1: expected 2 text(s), with a tab between" in mistake(
        capsys, "predict", copy["cls"], tmp_path / "texts")


# ------------------------------------------------------------ tsne


def shown(monkeypatch, *tests):
    """tsne of these: (record, names, labels, class logits, features) each."""
    monkeypatch.setattr(evaluate, "test_sets", lambda args: (list(tests), []))
    return status("tsne", *(f"runs/{record['run']}" for record, *_ in tests), "-o", "x.png")


def cloud(names, rows=10, **record):
    labels = np.arange(rows) % len(names)
    features = np.random.default_rng(0).normal(size=(rows, 5))
    return fake(0, 0, 0.8) | record, tuple(names), labels, np.eye(len(names))[labels], features


def legend(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()] if panel.get_legend() else None


def test_tsne_draws_a_panel_a_run(pair, tmp_path):
    out, records = pair
    figure = tmp_path / "tsne.png"
    assert status("tsne", *(out / record["run"] for record in records[:2]), "-o", figure) == 0
    height, width, _ = matplotlib.image.imread(figure).shape
    assert width > 1.6 * height


def test_tsne_of_many_runs_goes_in_pairs(pair, drawn):
    out, records = pair
    assert status("tsne", *[out / records[0]["run"]] * 5, "-o", "tsne.png") == 0
    visible = [panel for panel in drawn[0].axes if panel.axison]
    assert len(drawn[0].axes) == 6 and len(visible) == 5
    assert len({panel.get_xlim() for panel in visible}) == 1  # one scale


def test_text_in_a_picture_is_text(monkeypatch, tmp_path):
    names = ["_x", "$5 to $10", r"$\frac$", "a_b^c"]
    figures, save = [], evaluate.save  # what the others see, and what is written
    monkeypatch.setattr(evaluate, "save", lambda figure, *_: figures.append(figure))
    assert shown(monkeypatch, cloud(names, task=r"$\frac$ " + 30 * "long words ")) == 0
    save(figures[0], tmp_path / "x.png", 4, 4)
    panel = figures[0].axes[0]
    assert legend(panel) == names
    assert all(len(line) <= 50 for line in panel.get_title().splitlines())
    texts = [panel.title, *panel.get_legend().get_texts()]
    assert not any(text.get_parse_math() for text in texts) and (tmp_path / "x.png").is_file()


@pytest.mark.parametrize("classes", [2, 7, 12, 36])
def test_any_number_of_classes_stays_distinguishable(monkeypatch, drawn, classes):
    names = [f"class {number}" for number in range(classes)]
    assert shown(monkeypatch, cloud(names, rows=2 * classes)) == 0
    panel = drawn[0].axes[0]
    looks = {(matplotlib.colors.to_hex(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes())
             for points in panel.collections}
    assert len(looks) == classes and legend(panel) == names


def test_a_panel_with_other_classes_has_its_own_legend(monkeypatch, drawn):
    assert shown(monkeypatch, cloud(["a", "b"]), cloud(["a", "b"], lam=0.9, tau=0.3), cloud(["c", "d", "e"])) == 0
    assert [legend(panel) for panel in drawn[0].axes] == [["a", "b"], None, ["c", "d", "e"]]


def test_the_title_says_what_tells_a_panel_from_the_others(pair, tmp_path, drawn, capsys):
    out, records = pair
    longer = run(tmp_path / "longer", "--shots", 20, "--lam", 0, "--max-steps", 5)
    first = out / records[0]["run"]
    second_seed = next(out / record["run"] for record in records if record["seed"] == 1 and not record["lam"])
    folders = [first, second_seed, tmp_path / "longer" / longer[0]["run"]]
    assert status("tsne", *folders, "-o", "x.png") == 0
    titles = [" ".join(panel.get_title().split("\ntest accuracy")[0].split()) for panel in drawn[0].axes]
    assert len(set(titles)) == 3 and all(title.startswith("demo, N = 20, CE, seed ") for title in titles)
    assert "seed 1" in titles[1] and "steps 5" in titles[2] and not any(str(out) in title for title in titles)


def test_tsne_of_too_few_rows_or_of_rows_all_alike(monkeypatch, drawn, capsys):
    for rows in (1, 2, 3):
        assert shown(monkeypatch, cloud(["a", "b"], rows=rows)) == 2
    record, names, labels, class_logits, features = cloud(["a", "b"])
    for alike in (np.full_like(features, 0.3), np.full_like(features, np.nan), np.zeros_like(features),
                  np.outer(np.arange(1, 11), [1, 2, 3.3])):
        assert shown(monkeypatch, (record, names, labels, class_logits, alike)) == 2
    assert capsys.readouterr().err.count("\n") == 7 and not drawn


@pytest.mark.parametrize("features", [
    np.repeat([[1.0, 2.0], [2.0, 1.0]], 50, axis=0), np.eye(4, dtype="f"), np.eye(40, 2), 1 + 1e-5 * np.eye(40),
    np.float32(1e-30) * np.arange(40, dtype=np.float32).reshape(10, 4)])  # fmt: skip
def test_tsne_of_rows_that_are_nearly_alike_is_a_picture(monkeypatch, drawn, features):
    names, labels = ("a", "b"), np.arange(len(features)) % 2
    assert shown(monkeypatch, (fake(0, 0, 0.8), names, labels, np.eye(2)[labels], features)) == 0
    assert all(np.isfinite(points.get_offsets()).all() for points in drawn[0].axes[0].collections)
