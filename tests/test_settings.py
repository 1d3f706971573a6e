"""parts.settings: which records belong to one setting and one row, which rows are compared, what is refused."""

import json
from pathlib import Path

import pytest

from fakes import fake, pairs, write
from parts import settings
from parts.errors import UserError
from parts.records import read_records

RESULTS = Path(settings.__file__).parents[1] / "results"
CE_SCL = "CE + SCL (0.9, 0.3)"


def read(*files):
    return settings.read_settings([str(file) for file in files])


def refusal(function, *files):
    with pytest.raises(UserError) as refused:
        function([str(file) for file in files])
    return str(refused.value)


# ------------------------------------------------------------ settings


def test_a_flag_that_this_code_does_not_know_makes_another_setting(tmp_path):
    assert len(read(write(tmp_path, fake(0, 0, 0.8, layers=3), fake(1, 0, 0.8, layers=4)))) == 2


@pytest.mark.parametrize("value", [None, False])
def test_a_missing_field_equals_none_and_false(tmp_path, value):
    (rows,) = read(write(tmp_path, fake(0, 0, 0.8), fake(1, 0, 0.8, new_flag=value))).values()
    assert [sorted(row) for row in rows.values()] == [[0, 1]]


@pytest.mark.parametrize("field, value", [
    ("test_checksum", "u"), ("test_size", 3), ("batch_size", 32), ("model", "other"), ("pooling", "mean"),
    ("dropout", 0)])
def test_another_value_makes_another_setting(tmp_path, field, value):
    assert len(read(write(tmp_path, fake(0, 0, 0.8), fake(1, 0, 0.8, **{field: value})))) == 2


@pytest.mark.parametrize("field", ["lr", "head_lr", "steps", "eval_every"])
def test_learning_rates_and_steps_make_another_row_of_the_same_setting(tmp_path, field):
    (rows,) = read(write(tmp_path, fake(0, 0, 0.8), fake(0, 0, 0.7, **{field: 7}))).values()
    assert sorted(record["test_accuracy"] for row in rows.values() for record in row.values()) == [0.7, 0.8]
    assert len(rows) == 2


@pytest.mark.parametrize("field", [
    "device", "cpu_capability", "python", "torch", "transformers", "commit", "data_dir", "processes",
    "train_checksum", "validation_checksum", "validation_size", "num_texts", "label_checksum",
    "ce", "scl", "scl_lowest", "scl_collapsed", "best_step", "validation_accuracies", "test_macro_f1", "test_mcc"])
def test_results_machine_and_what_follows_from_the_seed_do_not_make_another_setting(tmp_path, field):
    (rows,) = read(write(tmp_path, fake(0, 0, 0.8), fake(1, 0, 0.8, **{field: "7"}))).values()
    assert len(rows) == 1


def test_two_checkpoints_of_one_transfer_are_one_setting(tmp_path):
    models = {0: "runs/sst2-n60-lam0-seed0-0a1b2c/", 0.9: "runs/sst2-n60-lam0.9-tau0.3-seed0-3d4e5f"}
    (rows,) = read(write(tmp_path, *(fake(0, lam, 0.8, model=model) for lam, model in models.items()))).values()
    assert len(rows) == 2 and all(settings.is_transfer(row[0]) for row in rows.values())
    (rows,) = read(write(tmp_path, fake(0, 0, 0.8, model="encoder/"))).values()
    assert not any(settings.is_transfer(row[0]) for row in rows.values())


def test_a_row_with_several_source_checkpoints_is_refused(tmp_path):
    models = "lam0-seed0-0a1b2c", "lam0-seed1-0a1b2d", "lam0.9-tau0.3-seed1-3d4e5f"
    records = [fake(seed, 0, 0.8, model=f"runs/sst2-n60-{model}") for seed, model in enumerate(models)]
    assert len(read(write(tmp_path, *records[:2]))) == 1  # the seed of the source may differ
    told = refusal(settings.read_settings, write(tmp_path, *records))
    assert "has different source checkpoints in run" in told


def test_a_new_record_with_arm_and_base_model_matches_an_old_one(tmp_path):
    old = fake(0, 0, 0.8, run="sst2-n20-lam0-seed0-0a1b2c", model="runs/sst2-n60-lam0-seed0-0a1b2c")
    new = fake(1, 0, 0.8, run="sst2-n20-lam0-seed1-0a1b2d", model="runs/sst2-n60-lam0-seed0-0a1b2c",
               arm="sst2-n20-lam0", base_model="runs/sst2-n60")
    (rows,) = read(write(tmp_path, old, new)).values()
    (row,) = rows.values()
    assert {(record["arm"], record["base_model"]) for record in row.values()} == {("sst2-n20-lam0", "runs/sst2-n60")}


def test_every_committed_record_is_read():
    for file in (*RESULTS.glob("*.jsonl"), *RESULTS.glob("*/results.jsonl")):
        if file.parent.name != "baselines":  # its records are not finetune.py's
            found = [record for rows in read(file).values() for row in rows.values() for record in row.values()]
            assert len(found) == len(read_records(file))


# ------------------------------------------------------------ files, duplicates, invalid records


def test_a_folder_stands_for_its_results(tmp_path):
    write(tmp_path, *pairs([0.1, 0.2]))
    (rows,) = read(tmp_path).values()
    assert len(rows) == 2


def test_a_run_in_two_files_counts_once_and_another_run_of_its_seed_is_refused(tmp_path):
    records = [fake(seed, 0, 0.8) for seed in range(3)]
    files = [write(tmp_path, *records[:2], name="a.jsonl"), write(tmp_path, *records, name="b.jsonl")]
    ((row,),) = (rows.values() for rows in read(*files).values())
    assert sorted(row) == [0, 1, 2]
    told = refusal(settings.read_settings, *files, write(tmp_path, fake(0, 0, 0.8), name="c.jsonl"))
    assert "sst2, N = 20, CE has seed 0 twice, run" in told and "a.jsonl" in told and "c.jsonl" in told


def test_a_repeated_run_with_another_result_is_refused(tmp_path):
    files = [write(tmp_path, fake(0, 0, accuracy, run="same"), name=f"{accuracy}.jsonl") for accuracy in (0.8, 0.9)]
    assert "has seed 0 twice" in refusal(settings.read_settings, *files)


@pytest.mark.parametrize("field, shots", [("train_size", 20), ("train_size", None), ("train_checksum", None),
                                          ("validation_checksum", None)])
def test_a_row_with_several_training_files_is_refused(tmp_path, field, shots):
    """With a fixed number of shots, the training set depends on the seed, but its size does not."""
    same = {"shots": shots, "train_size": 20, "train_checksum": "a", "validation_checksum": "a"}
    read(write(tmp_path, fake(0, 0, 0.8, **same), fake(1, 0, 0.8, **same)))
    other = fake(1, 0, 0.8, **same | {field: "7"})
    told = refusal(settings.read_settings, write(tmp_path, fake(0, 0, 0.8, **same), other))
    assert "CE has different training data in run" in told and "results.jsonl); keep one" in told


def test_noise_changes_the_training_set_of_each_seed(tmp_path):
    noisy = {"shots": None, "noise": "label", "noise_level": 0.1}
    (rows,) = read(write(tmp_path, fake(0, 0, 0.8, **noisy), fake(1, 0, 0.8, **noisy))).values()
    assert len(rows) == 1


@pytest.mark.parametrize("name", ["nowhere.jsonl", "x" * 300])
def test_a_missing_file(name):
    assert f"no file {name}" in refusal(settings.read_settings, name)


def test_a_file_without_records(tmp_path):
    assert "no record in" in refusal(settings.read_settings, write(tmp_path))


@pytest.mark.parametrize("field, value, message", [
    ("test_accuracy", 1.5, "test_accuracy is 1.5"),
    ("test_accuracy", "0.8", "test_accuracy is '0.8'"),
    ("validation_accuracy", float("nan"), "validation_accuracy is nan"),
    ("lam", "0.9", "lam is '0.9'"),
    ("lam", 0, "lam is 0 and tau is 0.3"),
    ("tau", None, "lam is 0.9 and tau is None"),
    ("model", ["a"], "model is ['a']"),
    ("steps", 0, "steps is 0"),
    ("noise", "label", ""),
    ("test_correct", "ff", ""), ("test_correct", "zz" * 50, ""), ("test_correct", 7, ""), ("test_correct", ["ff"], ""),
    ("test_correct", "ff" * 49 + "f", ""),
])
def test_an_invalid_record_is_refused_with_its_file_and_run(tmp_path, field, value, message):
    told = refusal(settings.read_settings, write(tmp_path, fake(0, 0.9, 0.8, run="mine") | {field: value}))
    assert message in told and "run mine in " in told and "results.jsonl cannot be used (" in told


@pytest.mark.parametrize("field", [
    "task", "model", "pooling", "lam", "lr", "head_lr", "steps", "eval_every", "seed", "train_checksum",
    "validation_checksum", "test_checksum", "test_size", "validation_accuracy", "test_accuracy", "seconds"])
def test_a_record_without_a_needed_field_is_refused(tmp_path, field):
    record = {name: value for name, value in fake(0, 0, 0.8, run="mine").items() if name != field}
    told = refusal(settings.read_settings, write(tmp_path, record))
    assert f"it has no {field}" in told and "run mine" in told


# ------------------------------------------------------------ the row of CE that a row is compared with


def compared(tmp_path, record, *of_ce):
    """Returns the CE records that the record's row is compared with."""
    ((key, rows),) = read(write(tmp_path, record, *of_ce)).items()
    assert key
    return list(settings.matching_row(rows, settings.CE, record).values())


@pytest.mark.parametrize("record, of_ce, expected", [
    (fake(0, 0.9, 0.8), [{}, {"lr": 2e-5}, {"steps": 100}, {"head_lr": 1e-3}], 0),  # the same learning rates and steps
    (fake(0, 0.9, 0.8, eval_every=5), [{}, {"eval_every": 5}], 1),
    (fake(0, 0.9, 0.8, eval_every=5), [{}, {"lr": 2e-5}], 0),  # another eval_every is close enough
    (fake(0, 0.9, 0.8), [{"lr": 2e-5, "head_lr": 2e-5}], 0),  # the only row
    (fake(0, 0.9, 0.8), [{"lr": 2e-5}, {"lr": 5e-5}], None),
    (fake(0, 0.9, 0.8, head_lr=1e-3), [{}, {"steps": 100}], None),
    (fake(0, 1, 0.8, head_lr=1e-3), [{}, {"steps": 100}], 0),  # lam = 1 trains its classifier alone
    (fake(0, 0.9, 0.8), [], None),
])
def test_the_row_of_ce_has_the_same_learning_rates_and_steps_or_is_the_only_one(tmp_path, record, of_ce, expected):
    found = compared(tmp_path, record, *(fake(0, 0, i / 10, **tuned) for i, tuned in enumerate(of_ce)))
    assert [found_record["test_accuracy"] for found_record in found] == ([] if expected is None else [expected / 10])


def test_effects_fall_back_on_the_only_ce_of_the_same_file(tmp_path):
    """Two files tuned CE in two ways; together CE has two rows."""
    slow = [fake(0, 0, 0.7, lr=2e-5), fake(0, 0.9, 0.8)]
    fast = [fake(0, 0, 0.75, lr=5e-5), fake(0, 0.9, 0.85, lr=5e-5)]
    files = [str(write(tmp_path, *records, name=name)) for records, name in ((slow, "a.jsonl"), (fast, "b.jsonl"))]
    found = [(row[0]["test_accuracy"], ce[0]["test_accuracy"]) for row, ce in settings.read_effects(files)]
    assert found == [(0.8, 0.7), (0.85, 0.75)]


def test_effects_without_a_pair(tmp_path):
    told = refusal(settings.read_effects, write(tmp_path, fake(0, 0, 0.8), fake(1, 0.9, 0.8)))
    assert "no seed has both --lam 0 and --lam 0.9 --tau 0.3" in told


def test_a_comparison_that_is_not_drawn_is_reported(tmp_path, capsys):
    records = [*pairs([0.1]), *pairs([0.1], shots=100)[1:], fake(0, 0, 0.7, task="rte", lr=2e-5),
               fake(0, 0, 0.7, task="rte", lr=5e-5), fake(0, 0.9, 0.8, task="rte")]
    assert len(settings.read_effects([str(write(tmp_path, *records))])) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"not drawn: {name}, {CE_SCL}, because no row of CE has the same seeds, learning rates and number of steps"
        for name in ("sst2, N = 100", "rte, N = 20")]


def test_pairs_with_different_data_are_refused(tmp_path):
    file = write(tmp_path, fake(0, 0, 0.8), fake(0, 0.9, 0.8, train_checksum="u"))
    assert f"CE and {CE_SCL} have different train sets at seed 0" in refusal(settings.read_effects, file)


# ------------------------------------------------------------ the paper's gain


@pytest.mark.parametrize("gain, fields", [
    (2.2, {}), (1.7, {"shots": 100}), (0.3, {"shots": None}), (None, {"shots": 50}), (None, {"tau": 0.5}),
    (None, {"batch_size": 64}), (None, {"shots": 100, "noise": "label", "noise_level": 0.3}),
    (0.6, {"shots": 100, "noise": "backtranslation", "noise_level": 0.3, "translators": ["a", "b"]}),
    (None, {"task": "my/sst2"}), (None, {"shots": None, "shots_per_class": 20, "task": "amazon_polarity"}),
    (2.9, {"shots": None, "shots_per_class": 20, "task": "amazon_polarity",
           "model": "runs/sst2-n60-lam0.9-tau0.3-seed0-0a1b2c"}),
    (None, {"model": "runs/sst2-n60-lam0.9-tau0.3-seed0-0a1b2c"}),
])
def test_the_papers_gain_belongs_to_its_own_setting_and_method(tmp_path, gain, fields):
    ((row,),) = (rows.values() for rows in read(write(tmp_path, fake(0, 0.9, 0.8, **fields))).values())
    assert row[0]["papers_gain"] == (None if gain is None else pytest.approx(gain))


# ------------------------------------------------------------ grid


def test_a_grid_gives_its_cells_and_ce_for_the_seeds_of_the_cells(tmp_path):
    cells_of_grid = [fake(seed, lam, 0.8) for seed in (0, 1) for lam in (0.5, 0.9)]
    file = write(tmp_path, *cells_of_grid, *(fake(seed, 0, 0.8) for seed in range(4)))
    cells, ce = settings.read_grid([str(file)])
    assert sorted(cells) == [(0.5, 0.3), (0.9, 0.3)] and sorted(ce) == [0, 1]


def test_a_grid_without_ce_of_all_its_seeds_has_no_ce(tmp_path):
    _, ce = settings.read_grid([str(write(tmp_path, fake(0, 0, 0.8), fake(0, 0.9, 0.8), fake(1, 0.9, 0.8)))])
    assert ce == {}


def test_a_grid_prefers_ce_with_its_own_number_of_steps(tmp_path):
    records = [fake(0, 0, 0.1, steps=100), fake(0, 0, 0.2), fake(0, 0.9, 0.8), fake(0, 1, 0.8, head_lr=1e-3)]
    cells, ce = settings.read_grid([str(write(tmp_path, *records))])
    assert len(cells) == 2 and ce[0]["test_accuracy"] == 0.2


@pytest.mark.parametrize("records, message", [
    ([fake(0, 0.9, 0.8), fake(0, 0.9, 0.8, shots=100)], "a grid needs one setting, but shots is "),
    ([fake(0, 0.9, 0.8), fake(0, 0.5, 0.8, lr=1e-3)], "(0.5, 0.3) has lr 0.001, CE + SCL (0.9, 0.3) has 1e-05"),
    ([fake(0, 0.9, 0.8), fake(0, 0.5, 0.8, steps=9)], "CE + SCL (0.5, 0.3) has steps 9, CE + SCL (0.9, 0.3) has 200"),
    ([fake(0, 0.9, 0.8), fake(0, 0.9, 0.8, head_lr=1e-3)], "has head_lr 0.001, CE + SCL (0.9, 0.3) has 1e-05"),
    ([fake(0, 1, 0.8), fake(0, 0.9, 0.8), fake(0, 0.5, 0.8, head_lr=1e-3)], "has head_lr 0.001, CE + SCL (0.9, 0.3)"),
    ([fake(0, 1, 0.8), fake(0, 1, 0.8, head_lr=1e-3)], "has several values of head_lr"),
    ([fake(0, 0.9, 0.8), fake(0, 0.5, 0.8, validation_checksum="u")], "have different validation sets at seed 0"),
    ([fake(0, 0.9, 0.8), fake(0, 0, 0.8, train_checksum="u")], "have different train sets at seed 0"),
    ([fake(0, 0.9, 0.8), fake(1, 0.9, 0.8), fake(0, 0.5, 0.8)], "CE + SCL (0.5, 0.3) lacks seed 1"),
    ([fake(0, 0, 0.8)], "no run with --lam above 0"),
])
def test_a_grid_of_unlike_cells_is_refused(tmp_path, records, message):
    assert message in refusal(settings.read_grid, write(tmp_path, *records))


def test_the_records_of_a_grid_may_come_from_several_files(tmp_path):
    files = [str(write(tmp_path, fake(0, lam, 0.8), name=f"{lam}.jsonl")) for lam in (0, 0.5, 0.9)]
    cells, ce = settings.read_grid(files)
    assert len(cells) == 2 and json.loads(Path(files[0]).read_text())["run"] == ce[0]["run"]
