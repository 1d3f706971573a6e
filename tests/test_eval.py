"""eval.py: what every command prints, on made-up records, committed records and real checkpoints."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluate
import finetune
from conftest import run, sentences, write_lines
from fakes import fake, pairs, write
from parts import model, pretrained
from parts.data import Split
from parts.records import read_records
from parts.settings import LIMITS, TEXTS

RESULTS = Path(evaluate.__file__).parent / "results"
SCRIPT = Path(evaluate.__file__)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """CE and CE + SCL for two seeds, with checkpoints."""
    out = tmp_path_factory.mktemp("pair")
    records = run(out, "--shots", 20, "--lam", 0, 0.9, "--tau", 0.3, 0.5, "--seed", 0, 1, "--save")
    return out, records


def status(*argv):
    try:
        return evaluate.main(list(map(str, argv)))
    except SystemExit as stop:
        return stop.code


def user_error(capsys, *argv):
    """Runs a command that must fail. Returns its one line."""
    assert status(*argv) == 2
    captured = capsys.readouterr()
    (error,) = (line for line in captured.err.splitlines() if not line.startswith(("removed from", "note: ")))
    assert error.startswith("eval.py: error: ") and not captured.out
    return error


def tables(capsys, command, *argv):
    """Runs a command. Returns the markdown tables that it prints, as lists of dicts."""
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
    assert second["minus CE on validation [95 %]"] == "+1.0 [-1.2, +3.2]"  # half of it
    assert first["minus CE [95 %]"] == "" and "top 3 by validation" not in second
    assert first["s.e. of accuracy (test set)"] == "1.9"  # sqrt(.83 .17 / 400)


def test_one_seed_has_no_interval(tmp_path, capsys):
    _, second = rows(capsys, write(tmp_path, fake(0, 0, 0.8), fake(0, 0.9, 0.9)))
    assert second["all seeds"] == "90.0" and second["minus CE [95 %]"] == "+10.0 (no interval)"


def test_top_three_needs_ten_seeds(tmp_path, capsys):
    def both(n):
        records = (fake(s, lam, 0.8 + (s + lam) / 100, s / 100) for lam in (0, 0.9) for s in range(n))
        return rows(capsys, write(tmp_path, *records))[1]

    assert "top 3 by validation" not in both(9)
    assert both(10)["top 3 by validation"] == "88.9 ± 1.0"


def test_its_test_error_is_a_column_if_all_records_have_the_answers(tmp_path, capsys):
    """One seed: McNemar's, from the examples that only one of the two has right. Two seeds alike: the same."""
    rng = np.random.default_rng(0)
    ce, scl = rng.random((2, 403)) < [[0.6], [0.7]]
    only_ce, only_scl = (ce & ~scl).sum(), (scl & ~ce).sum()
    expected = (only_ce + only_scl - (only_scl - only_ce) ** 2 / 403) ** 0.5 / 403
    records = [fake(seed, lam, right.mean(), test_size=403, test_correct=np.packbits(right).tobytes().hex())
               for seed in (0, 1) for lam, right in ((0, ce), (0.9, scl))]
    for some in (records[:2], records):
        assert rows(capsys, write(tmp_path, *some))[1]["s.e. of difference (test set)"] == f"{100 * expected:.1f}"
    del records[0]["test_correct"]  # an old one
    assert "s.e. of difference (test set)" not in rows(capsys, write(tmp_path, *records))[1]


def test_each_setting_has_its_own_rows_and_differing_fields_are_columns(tmp_path, capsys):
    records = [fake(s, lam, 0.8, shots=n, noise=noise, noise_level=0.1 if noise else None)
               for s in (0, 1) for lam in (0, 0.9) for n in (20, 100) for noise in (None, "label")]
    table = rows(capsys, write(tmp_path, *records))
    assert len(table) == 8
    settings = {(row["shots"], row["noise"], row["n"]) for row in table}
    assert settings == set(itertools.product(("20", "100"), ("", "label"), ("2",)))


def test_a_learning_rate_that_differs_between_methods_is_a_column(tmp_path, capsys):
    rates = {0: {"lr": 2e-5, "head_lr": 2e-5}, 0.9: {}}
    records = [fake(s, lam, 0.8, **rates[lam]) for s in (0, 1) for lam in rates]
    ce, scl = rows(capsys, write(tmp_path, *records))
    assert (ce["lr"], scl["lr"]) == ("2e-05", "1e-05") and "head_lr" not in ce


def test_missing_pairs_are_noted(tmp_path, capsys):
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


def test_noise_is_compared_with_the_same_method_without(tmp_path, capsys):
    lost = {0: [0.10, 0.12], 0.9: [0.03, 0.05]}
    clean = [fake(seed, lam, 0.8) for lam in lost for seed in (0, 1)]
    noisy = [fake(seed, lam, 0.8 - lost[lam][seed], noise="label", noise_level=0.1, train_checksum="other")
             for lam in lost for seed in (0, 1)]
    table = rows(capsys, write(tmp_path, *clean, *noisy))
    assert [row["minus clean [95 %]"] for row in table] == ["", "", "-11.0 [-23.7, +1.7]", "-4.0 [-16.7, +8.7]"]


def test_methods_that_start_from_their_own_checkpoints_are_paired(tmp_path, capsys):
    models = {0: "runs/sst2-n60-lam0-seed0-0a1b2c", 0.9: "runs/sst2-n60-lam0.9-tau0.3-seed0-3d4e5f"}
    records = [fake(seed, lam, 0.8 + lam / 100, model=model) for lam, model in models.items() for seed in (0, 1)]
    _, scl = rows(capsys, write(tmp_path, *records))
    assert scl["minus CE [95 %]"] == "+0.9 [+0.9, +0.9]"


def test_a_folder_is_shown_by_its_last_name(tmp_path, capsys):
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
def test_a_terminal_with_ascii_only_and_a_closed_output(tmp_path, redirection):
    file = write(tmp_path, *pairs([0.1, 0.2], task="schön"))
    command = f"{sys.executable} {SCRIPT} table {file} {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr
    assert redirection or r"| sch\xf6n |" in done.stdout


# ------------------------------------------------------------ the mean over settings


def closing_lines(capsys, file):
    assert status("table", file) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if "mean difference between" in line or "disagree" in line]


def test_the_closing_line_weighs_settings_equally_and_counts_those_ahead(tmp_path, capsys):
    few = pairs([0.02, 0.04, -0.01, 0.0, 0.05], shots=100)
    many = pairs([0.01, -0.03] * 4 + [0.05, 0.06])
    line, random_effects = closing_lines(capsys, write(tmp_path, *few, *many, *pairs([-0.01, 0.02, 0.0, 0.01, 0.03],
                                                                                     shots=1000)))
    # The mean differences of the settings are 2.0, 0.3 and 1.0.
    assert line.startswith("The mean difference between CE + SCL (0.9, 0.3) and CE over 3 settings, in points: +1.1 [")
    assert line.endswith("better than CE in 3 of 3 settings and in 12 of 20 pairs of runs with the same seed.")
    assert "and CE is +1." in random_effects and "prediction interval for a new setting is [" in random_effects
    assert random_effects.endswith("I2 is 0 %.")


def test_the_closing_line_has_no_interval_with_few_seeds(tmp_path, capsys):
    file = write(tmp_path, *pairs([0.02, 0.01, 0.03, 0.02]), *pairs([0.02, 0.0, 0.01, 0.01], shots=100))
    (line,) = closing_lines(capsys, file)
    assert "over 2 settings, in points: +1.5 (no interval). CE + SCL" in line


@pytest.mark.parametrize("gains", [(0.089, -0.001), (0.089, 0.01)])
def test_two_settings_that_disagree_have_no_mean(tmp_path, capsys, gains):
    """They disagree in their sign, or their intervals do not overlap."""
    records = [pairs([gain - 0.01, gain, gain, gain + 0.01, gain], shots=n)
               for n, gain in zip((20, 100), gains, strict=True)]
    (line,) = closing_lines(capsys, write(tmp_path, *itertools.chain(*records)))
    assert line.startswith("The results of the two settings disagree, so no mean is given. CE + SCL (0.9, 0.3) is ")
    assert f"is better than CE in {1 + (gains[1] > 0)} of 2 settings and in " in line


def test_a_setting_with_several_rows_of_a_method_does_not_count_in_the_closing_line(tmp_path, capsys):
    seeds = [0.02, 0.01, 0.03, 0.02, 0.02]
    records = [*pairs(seeds), *pairs(seeds, shots=100), *pairs(seeds, shots=1000), *pairs(seeds, shots=1000, lr=1e-4)]
    line, *_ = closing_lines(capsys, write(tmp_path, *records))
    assert "over 2 settings" in line and "of 10 pairs" in line


# ------------------------------------------------------------ learning rates and steps


def test_each_learning_rate_and_number_of_steps_is_a_row_with_its_validation_accuracy(tmp_path, capsys):
    records = [fake(seed, lam, 0.8 + (lam > 0) * gain, 0.7 + seed / 10, lr=lr, head_lr=lr)
               for lr, gain in ((1e-5, 0.01), (2e-5, 0.03)) for lam in (0, 0.9) for seed in (0, 1)]
    table = rows(capsys, write(tmp_path, *records))
    assert [(row["lr"], row["method"], row["validation"]) for row in table] == [
        (lr, method, "75.0") for method in ("CE", "CE + SCL (0.9, 0.3)") for lr in ("1e-05", "2e-05")]
    assert [row["minus CE [95 %]"] for row in table] == ["", "", "+1.0 [+1.0, +1.0]", "+3.0 [+3.0, +3.0]"]


def test_a_single_row_of_each_method_has_no_column_validation(tmp_path, capsys):
    assert "validation" not in rows(capsys, write(tmp_path, *pairs([0.1, 0.2])))[0]


def test_without_ce_at_this_learning_rate_minus_ce_is_empty_unless_ce_has_one_row(tmp_path, capsys):
    def of_scl(*rates_of_ce):
        records = [fake(0, 0, 0.8, lr=lr) for lr in rates_of_ce] + [fake(0, 0.9, 0.9)]
        return rows(capsys, write(tmp_path, *records))[-1].get("minus CE [95 %]", "")

    assert of_scl(2e-5) == "+10.0 (no interval)" and of_scl(2e-5, 5e-5) == ""


def test_a_flag_that_differs_is_a_column_and_a_setting(tmp_path, capsys):
    table = rows(capsys, write(tmp_path, *pairs([0.1, 0.2]), *pairs([0.3, 0.5], ce=0.4, layers=3)))
    assert [(row["layers"], row["minus CE [95 %]"].split(" ")[0]) for row in table] == [
        ("", ""), ("", "+15.0"), ("3", ""), ("3", "+40.0")]


def test_other_test_data_of_the_same_name_is_a_column(tmp_path, capsys):
    table = rows(capsys, write(tmp_path, fake(0, 0, 0.8), fake(0, 0.9, 0.9, test_checksum="u")))
    assert [row["test_checksum"] for row in table] == ["t", "u"] and "minus CE [95 %]" not in table[1]


def test_the_top_three_difference_stands_beside_the_papers_gain(tmp_path, capsys):
    records = [fake(seed, lam, 0.7 + (lam > 0) * seed / 100, seed / 10, shots=n)
               for n in (20, 50) for lam in (0, 0.9) for seed in range(10)]
    found = [row["top 3 minus CE"] for row in rows(capsys, write(tmp_path, *records))]
    assert found == ["", "+8.0", "", ""]  # the paper has no gain for 50 examples


def test_one_setting_has_no_line_below_the_table(tmp_path, capsys):
    assert status("table", write(tmp_path, *pairs([0.02] * 6))) == 0
    assert "mean difference between" not in capsys.readouterr().out


def test_the_closing_line_of_the_few_shot_records(tmp_path, capsys):
    """MiniLM's nine few-shot settings, each as long as its trials chose, as another program computed the mean."""
    records = [r for r in read_records(RESULTS / "few-shot.jsonl") if r["shots"] == 1000]
    records += [r for r in read_records(RESULTS / "chosen-steps" / "results.jsonl") if not r["ce_temperature"]]
    assert status("table", write(tmp_path, *records)) == 0
    told = capsys.readouterr().out
    assert "over 9 settings, in points: +1.5 [+0.9, +2.1]" in told and "9 of 9 settings and in 57 of 75 pairs" in told


# ------------------------------------------------------------ invalid records


JUNK = (None, True, "0.8", "", -1, 0, 2.5, 1e300, float("nan"), float("inf"), 10**400, [], ["a"], {}, "x\ud800\n", [[]])


@pytest.mark.parametrize("field", [*fake(0, 0, 0.8), "test_correct"])
def test_a_record_with_anything_in_a_field_is_read_or_refused_in_one_line(tmp_path, capsys, field):
    for junk in JUNK:
        records = pairs([0.1, 0.2])
        records[-1][field] = junk
        code = status("table", write(tmp_path, *records))
        captured = capsys.readouterr()
        left_out = field == "run" and not isinstance(junk, str)  # such a line is said and left out
        assert code in (0, 2) and captured.err.count("\n") == (code == 2 or left_out)
        assert bool(captured.out) == (code == 0)


def test_records_are_read_without_torch(tmp_path):
    file = write(tmp_path, *pairs([0.1, 0.2]))
    code = (f"import sys, eval; assert eval.main(['table', {str(file)!r}]) == 0; "
            "print({'torch', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules))")
    root = SCRIPT.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr


# ------------------------------------------------------------ checkpoints


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


def test_score_gives_no_mean_if_a_seed_has_two_checkpoints(pair, tmp_path, capsys):
    """results/last_step.py writes two checkpoints of one run, and the record of the second one has no test accuracy."""
    out, records = pair
    ce = [out / record["run"] for record in records if record["lam"] == 0]
    last = shutil.copytree(ce[0], tmp_path / ce[0].name)
    record = json.loads((last / "record.json").read_text())
    del record["test_accuracy"]
    (last / "record.json").write_text(json.dumps(record))
    assert status("score", *ce, f"{ce[0]}/") == 0
    assert capsys.readouterr().out.count(f"| {ce[0].name} |") == 1  # one folder in two spellings is one row
    assert status("score", *ce, last) == 0
    captured = capsys.readouterr()
    assert "no means over the seeds: demo, N = 20, CE has seed 0 twice, " in captured.err
    assert captured.out.count(f"| {ce[0].name} |") == 2 and "Mean ±" not in captured.out


def test_score_does_not_average_over_different_settings(pair, tmp_path, capsys):
    out, records = pair
    (control,) = run(tmp_path, "--shots", 20, "--lam", 0, "--ce-temperature", 0.5, "--save")
    ce = [out / record["run"] for record in records if record["lam"] == 0]
    rows, means, *_ = tables(capsys, "score", *ce, tmp_path / control["run"], ce[0])
    assert [(row["run"], row["ce_temperature"]) for row in rows] == [*((run.name, "") for run in ce),
                                                                     (control["run"], "0.5")]
    assert [(row["ce_temperature"], row["n"]) for row in means] == [("", "2"), ("0.5", "1")]


def test_score_refuses_pairs_for_a_model_of_single_texts(checkpoints, tmp_path, capsys):
    for split in ("train", "test"):
        lines = ["text,text_pair,label", f"the {split},was great,positive", f"the {split},was dull,negative"]
        write_lines(tmp_path / "own" / f"{split}.csv", lines)
    error = user_error(capsys, "score", checkpoints["cls"], "--task", tmp_path / "own")
    assert "expects 1 text(s) per example, got 2" in error


def test_a_folder_of_glue_files_is_refused_for_the_demo(checkpoints, tmp_path, capsys):
    error = user_error(capsys, "score", checkpoints["cls"], "--task", "demo", "--data-dir", tmp_path)
    assert "argument --data-dir: needs a task of sst2" in error


def test_score_on_another_task(checkpoints, own, capsys):
    """Its numbers are the checkpoint's classes, by their order."""
    rows = [("on friday evening the plot was great .", 1), ("on friday evening the plot was dull .", 0)]
    task = own(train=[("so great", 1), ("so dull", 0)], test=rows * 2)
    for folder in checkpoints.values():
        summary, confusion = tables(capsys, "score", folder, "--task", task)
        assert (summary[0]["accuracy"], summary[0]["task"]) == ("1.0000", "own")
        assert list(confusion[0])[1:] == ["negative", "positive"]


def test_score_matches_classes_by_name_not_by_order(own, tmp_path, capsys):
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
    assert f"but the record has {record['test_accuracy']:.4f}" in captured.err


def test_score_refuses_classes_of_other_names(checkpoints, own, capsys):
    folder = own(train=[("c", "red"), ("d", "blue")] * 3, test=[("a", "red"), ("b", "blue")])
    told = user_error(capsys, "score", checkpoints["cls"], "--task", folder)
    assert "argument --task: the classes of" in told and "are blue, red, but those of" in told
    assert "are negative, positive" in told


ANIMALS = [("on friday evening the cat purred .", "the cat"), ("on friday evening the dog barked .", "the dog")]


def numbered(tmp_path, capsys, name, cat, dog, test_only=False):
    """Writes a folder with two numbered classes."""
    texts = [(text, cat if label == "the cat" else dog) for text, label in ANIMALS]
    for split, n in (("train", 20), ("test", 4)):
        write_lines(tmp_path / name / f"{split}.csv", ["text,label", *(f"{text} {split} {i},{label}" for i in range(n)
                                                                       for text, label in texts)])
    return tmp_path / name


def test_score_refuses_other_numbers_and_says_that_equal_numbers_are_matched_by_number(tmp_path, capsys):
    train = numbered(tmp_path, capsys, "one_two", cat=2, dog=1)
    out = tmp_path / "out"
    flags = ["--model", "demo", "--shots", "20", "--max-steps", "4", "--out", str(out)]
    assert finetune.main(["--task", str(train), *flags]) == 0
    (record,) = read_records(out / "results.jsonl")
    capsys.readouterr()
    told = user_error(capsys, "score", out / record["run"], "--task", numbered(tmp_path, capsys, "zero_one", 0, 1))
    assert "are 0, 1, but those of" in told and "are 1, 2;" in told

    assert status("score", out / record["run"], "--task", numbered(tmp_path, capsys, "swapped", 1, 2)) == 0
    assert "stand for these class names: 1 = 1, 2 = 2" in capsys.readouterr().err
    assert status("score", out / record["run"]) == 0
    assert "by number" not in capsys.readouterr().err  # its own test set


def test_score_prints_which_word_each_number_is(checkpoints, own, capsys):
    task = own(train=[("so great", 1), ("so dull", 0)], test=[("great .", 1), ("dull .", 0)] * 2)
    assert status("score", checkpoints["cls"], "--task", task) == 0
    assert "stand for these class names: 0 = negative, 1 = positive" in capsys.readouterr().err


def test_score_matches_numbers_if_the_texts_are_those_of_its_own_test_set(own, tmp_path, capsys):
    flags = ["--model", "demo", "--max-steps", "4", "--out", str(tmp_path / "out")]
    for names in (("bad", "good"), (0, 1)):
        rows = [(text, names[i % 2]) for i, text in enumerate(sentences(90))]
        folder = own(train=rows[:60], test=rows[60:])
        if names[0] == "bad":
            assert finetune.main(["--task", str(folder), *flags]) == 0
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    summary, confusion = tables(capsys, "score", tmp_path / "out" / record["run"], "--task", folder)
    assert summary[0]["accuracy"] == f"{record['test_accuracy']:.4f}" and list(confusion[0])[1:] == ["bad", "good"]


def test_score_refuses_a_number_that_no_word_has(checkpoints, own, capsys):
    """The label -1 often means that an example has no label."""
    folder = own(train=[("so great", 1), ("so dull", 0), ("so so", -1)], test=[("great .", 1), ("dull .", 0)])
    told = user_error(capsys, "score", checkpoints["cls"], "--task", folder)
    assert "are -1, 0, 1, but those of" in told and "are negative, positive; use the same names" in told


def test_score_ignores_case_and_hyphens_in_class_names(checkpoints, own, capsys):
    rows = [("on friday evening the plot was great .", "Positive"),
            ("on friday evening the plot was dull .", "NEGATIVE")]
    task = own(train=[("so great", "Positive"), ("so dull", "NEGATIVE")], test=rows * 2)
    summary, _ = tables(capsys, "score", checkpoints["cls"], "--task", task)
    assert summary[0]["accuracy"] == "1.0000"


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
])
def test_a_damaged_checkpoint_has_no_score(copy, capsys, pooling, spoil):
    spoil(copy[pooling])
    assert str(copy[pooling]) in user_error(capsys, "score", copy[pooling])


@pytest.mark.parametrize("text", [
    '{"run": "de', "[]", "[[1, 2]]", "null", "7", "{}", "[" * 10**5, '{"run": "a", "task": 7}', "\0", '"x"'])
def test_a_broken_record(copy, capsys, text):
    (copy["cls"] / "record.json").write_text(text)
    assert "record.json" in user_error(capsys, "score", copy["cls"])


@pytest.mark.parametrize("field", [*TEXTS, *LIMITS])
def test_a_checkpoint_record_without_a_needed_field_or_with_a_list_there(copy, capsys, field):
    file = copy["cls"] / "record.json"
    record = json.loads(file.read_text())
    for spoilt in ({n: v for n, v in record.items() if n != field}, record | {field: [1]}):
        file.write_text(json.dumps(spoilt))
        assert field in user_error(capsys, "score", copy["cls"])


def test_a_record_of_other_data(copy, capsys):
    file = copy["cls"] / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"test_checksum": "other"}))
    assert "was tested on other data" in user_error(capsys, "score", copy["cls"])


@pytest.mark.parametrize("argv, message", [
    (["score", "nowhere"], "nowhere is no checkpoint of finetune.py"),
    (["score", "x" * 300], "is no checkpoint of finetune.py"),
    (["tsne", "no\x1bwhere", "-o", "x.png"], r"no\x1bwhere is no checkpoint"),
    (["dance"], "invalid choice: 'dance'"),
    (["tsne", "runs"], "the following arguments are required: -o"),
    (["tsne", "runs", "-o", "noext"], "noext has no ending"),
    (["tsne", "runs", "-o", "no/x.png"], "no folder no"),
    (["tsne", "runs", "-o", "x" * 300 + "/x.png"], "no folder xxx"),
])
def test_user_errors(capsys, argv, message):
    assert message in user_error(capsys, *argv)


def test_a_picture_that_cannot_be_written_leaves_nothing(pair, tmp_path, capsys):
    out, _ = pair
    (tmp_path / "folder.png").mkdir()
    for figure in ("x.nonsense", "folder.png", "x" * 300 + ".png"):
        assert "eval.py: error: " in user_error(capsys, "grid", out / "results.jsonl", "-o", tmp_path / figure)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_file_without_read_permission(tmp_path, capsys):
    file = write(tmp_path, fake(0, 0, 0.8))
    file.chmod(0)
    assert "results.jsonl" in user_error(capsys, "table", file)


def test_a_deleted_working_folder(tmp_path):
    for argv in ("table results.jsonl", "grid results.jsonl -o x.png", "score run", "tsne run -o x.png"):
        gone = tmp_path / "gone"
        gone.mkdir()
        command = f"rmdir {gone}; {sys.executable} {SCRIPT} {argv}"
        done = subprocess.run(command, shell=True, cwd=gone, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "eval.py: error: " in done.stderr


def test_an_interrupt(tmp_path, capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "table", interrupt)
    assert status("table", "x") == 130 and capsys.readouterr().err == "interrupted\n"


def test_main_works_in_a_thread_and_with_an_output_stream_of_a_notebook(tmp_path, monkeypatch):
    class Stream:
        written = ""

        def write(self, text):
            self.written += text

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", stream := Stream())
    codes = []
    thread = threading.Thread(target=lambda: codes.append(status("table", write(tmp_path, *pairs([0.1, 0.2])))))
    thread.start()
    thread.join()
    assert codes == [0] and "CE + SCL" in stream.written


# ------------------------------------------------------------ predict


TEXTS = ["on sunday morning the plot felt great !", "the cast was dull .", "fresh"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_predict_prints_class_and_probability_of_each_line(checkpoints, pooling, tmp_path, capsys):
    folder, names = str(checkpoints[pooling]), ("negative", "positive")
    write_lines(tmp_path / "texts", TEXTS)
    assert status("predict", folder, tmp_path / "texts") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    trained = pretrained.load_model(folder, pooling, names, pretrained.load_tokenizer(folder, pooling), 0.0)
    class_logits, _ = model.predict(trained, Split([(text,) for text in TEXTS], np.zeros(3, int)))
    odds = np.exp(class_logits[:, 1] - class_logits[:, 0].astype(float))  # of positive
    assert [name for name, _ in lines] == [names[int(odd > 1)] for odd in odds]
    assert [float(p) for _, p in lines] == pytest.approx(np.maximum(odds, 1) / (1 + odds), abs=1e-4)


def test_predict_reads_all_line_ends_and_a_byte_order_mark(checkpoints, tmp_path, capsys):
    """A byte-order mark, carriage returns, a line separator within a text; a sign that no tokenizer knows."""
    (tmp_path / "plain").write_bytes("\n".join([*TEXTS, "\U0001f643"]).encode())
    (tmp_path / "other").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*TEXTS, "\U0001f643", ""]).encode())
    (tmp_path / "strange").write_bytes("one\u2028text of one line".encode())
    told = []
    for name in ("plain", "other", "strange"):
        assert status("predict", checkpoints["cls"], tmp_path / name) == 0
        told.append(capsys.readouterr().out.splitlines())
    assert told[0] == told[1] and list(map(len, told)) == [4, 4, 1]


def test_truncated_texts_are_reported(checkpoints, own, tmp_path, capsys):
    write_lines(tmp_path / "texts", ["dull " * 100, "great"])
    assert status("predict", checkpoints["cls"], tmp_path / "texts") == 0
    told = f"{checkpoints['cls']}: warning: {{}} of 2 texts have more than 64 tokens; the model does not see the rest"
    assert told.format(1) in capsys.readouterr().err
    rows = [("great", "positive"), ("dull", "negative")]
    test = [(99 * f"{text} ", label) for text, label in rows]
    folder = own(train=[(f"so {text}", label) for text, label in rows], test=test)
    assert status("score", checkpoints["cls"], "--task", folder) == 0
    assert told.format(2) in capsys.readouterr().err
    short = [(text, "positive") for text in sentences(300)]
    folder = own(test=[*short, (99 * "dull ", "negative")])  # the long text is the last of 301 texts
    assert status("score", checkpoints["cls"], "--task", folder) == 0
    assert "warning: 1 of 301 texts have more than 64 tokens" in capsys.readouterr().err


def test_predict_reads_standard_input(checkpoints):
    command = [sys.executable, str(SCRIPT), "predict", str(checkpoints["mean"])]
    done = subprocess.run(command, input="\n".join(TEXTS), capture_output=True, text=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()][:2] == ["positive", "negative"], done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("content, message", [
    (b"one\tpair\n", "expects 1 text(s) per example, got 2"),
    (b"\xff\xfe", "is not UTF-8"), (None, "cannot be used"),
    (b"", "has no texts")])
def test_predict_refuses_other_files(checkpoints, tmp_path, capsys, content, message):
    file = tmp_path / "texts"
    if content is not None:
        file.write_bytes(content)
    assert message in user_error(capsys, "predict", checkpoints["cls"], file)


def test_predict_needs_pairs_if_the_task_has_pairs(copy, tmp_path, capsys):
    record = json.loads((copy["cls"] / "record.json").read_text())
    (copy["cls"] / "record.json").write_text(json.dumps(record | {"num_texts": 2}))
    write_lines(tmp_path / "texts", TEXTS)
    assert "expects 2 text(s) per example, got 1" in user_error(
        capsys, "predict", copy["cls"], tmp_path / "texts")


def test_a_damaged_config_is_an_error_of_run(copy, tmp_path, capsys):
    (copy["cls"] / "config.json").write_text("{")
    write_lines(tmp_path / "texts", TEXTS)
    assert "argument RUN: " in user_error(capsys, "predict", copy["cls"], tmp_path / "texts")


def test_out_of_memory_names_the_device(checkpoints, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("parts.model.predict", full)
    assert "argument --device: out of memory" in user_error(capsys, "score", checkpoints["cls"])


# ------------------------------------------------------------ tsne


def test_tsne_draws_a_panel_for_each_run(pair, tmp_path):
    out, records = pair
    figure = tmp_path / "tsne.png"
    assert status("tsne", *(out / record["run"] for record in records[:2]), "-o", figure) == 0
    height, width, _ = matplotlib.image.imread(figure).shape
    assert width > 1.4 * height
