"""Several processes: the numbers stay those of one process."""

import pytest

from conftest import finish, run, script
from parts.records import read_records


@pytest.mark.parametrize("flags", [[], ["--micro-batch-size", "3"]])
def test_two_ranks_give_the_losses_of_one_process(tmp_path, flags):
    common = ["--shots", "40", "--max-steps", "30", "--dropout", "0", "--lam", "0", "0.9", "--save", *flags]
    output, _ = finish(script(tmp_path / "two", *common, ranks=2))
    assert output.count("step 30/30") == 2  # two runs; only rank 0 prints
    two_ranks = read_records(tmp_path / "two" / "results.jsonl")
    for one, two in zip(run(tmp_path / "one", *common), two_ranks, strict=True):
        assert (one.pop("processes"), two.pop("processes")) == (1, 2) and one.keys() == two.keys()
        for name in ("ce", "scl", "scl_lowest", "scl_collapsed"):
            assert two.get(name) == pytest.approx(one.get(name), abs=1e-5)
        assert two["validation_accuracy"] == one["validation_accuracy"]
        assert (tmp_path / "two" / two["run"] / "model.safetensors").is_file()


def test_a_batch_that_the_ranks_cannot_share_equally(tmp_path):
    _, error = finish(script(tmp_path, "--shots", "40", "--batch-size", "15", ranks=2), code=1)  # torchrun's own code
    assert "argument --batch-size: expected a multiple of 2, one share for each process, got 15" in error


def test_two_processes_with_one_folder_neither_lose_nor_repeat_a_record(tmp_path):
    flags = ("--shots", "20", "--max-steps", "20", "--lam", "0", "0.9", "--seed", "0", "1")
    processes = [script(tmp_path, *flags) for _ in range(2)]
    for process in processes:
        finish(process)
    records = read_records(tmp_path / "results.jsonl")
    assert len(records) == len({record["run"] for record in records}) == 4
