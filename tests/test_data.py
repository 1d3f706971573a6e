"""From files to splits: reading, sampling, noise."""

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import sentences, write_lines

import data
from data import TASKS, Split, add_noise, allot, demo_data, load_data, read_rows, sample


def texts(split):
    return {" ".join(row).lower() for row in split.texts}


# ------------------------------------------------------------ reading


def test_bare_quotes_and_line_separators_stay_in_their_cell(glue):
    odd = ['"she said', 'a " in the middle', "one\u0085cell", "so\u2028is this", "null", "NA", "5", "nan"]
    write_lines(glue / "SST-2" / "train.tsv", ["sentence\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(odd))])
    train = load_data("sst2", glue, few_shot=False).train
    assert train.texts == [(text,) for text in odd]
    assert train.labels.tolist() == [0, 1] * 4


def test_carriage_returns_belong_to_the_line_end(glue):
    write_lines(glue / "SST-2" / "train.tsv", ["sentence\tlabel\r", "a b\t0\r", "c d\t1\r"])
    train = load_data("sst2", glue, few_shot=False).train
    assert (train.texts, train.labels.tolist()) == ([("a b",), ("c d",)], [0, 1])


def test_a_carriage_return_in_a_cell_is_a_space(glue):
    write_lines(glue / "SST-2" / "train.tsv", ["sentence\tlabel", "a\rb\t0", "c d\t1"])
    assert load_data("sst2", glue, few_shot=False).train.texts == [("a b",), ("c d",)]


def test_half_an_emoji_is_a_question_mark(own):
    rows = [(text, label) for text, label in zip(("so \ud83d", *sentences(3)), "abab", strict=True)]
    train = load_data(str(own("jsonl", train=rows, test=rows[2:])), None, few_shot=True).train
    assert train.texts[0] == ("so ?",) and train.checksum


def test_a_pair_is_a_pair_where_the_first_row_has_none(own):
    rows = [("so", "a"), ("not", "b")]
    folder = own("jsonl", train=rows, test=rows)
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"text": "so", "text_pair": "and so", "label": "a"}\n')
    with pytest.raises(data.Mistake, match=r"train.jsonl, line 1: no text_pair, but .*train.jsonl, line 3 has one"):
        load_data(str(folder), None, few_shot=True)


def test_cola_has_no_header(glue):
    train = load_data("cola", glue, few_shot=True).train
    assert len(train) == 120
    assert train.texts[1] == ("our tram sang 1 times",)
    assert train.labels[:3].tolist() == [0, 1, 0]


def test_mnli_columns_and_label_order(glue):
    loaded = load_data("mnli", glue, few_shot=False)
    assert loaded.train.texts[2] == ("his sister sang 2 times", "indeed his sister sang 2 times")
    assert loaded.label_names == ("entailment", "neutral", "contradiction")
    assert loaded.train.labels[:4].tolist() == [0, 1, 2, 0]  # gold_label, not label1


def test_torn_rows_of_glue_are_left_out_as_on_the_hub(glue, capsys):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = ["1\t1\t2\tso\tand so\t1", "2\t1\t2\tno", "3\t1\t2\tor not\t\t0"]
    write_lines(glue / "QQP" / "train.tsv", [header, *rows])
    write_lines(glue / "QQP" / "dev.tsv", [header, "1\t1\t2\ta\tb\t1"])
    assert load_data("qqp", glue, few_shot=False).train.texts == [("so", "and so"), ("or not", "")]
    assert "for a field is missing or too many: 1 of 3 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task, split", [("sst2", "validation"), ("mnli", "validation_matched"), ("yelp_polarity", "test")]
)
def test_the_hub_s_columns_and_splits(monkeypatch, task, split):
    """With the hub's own Dataset class in place of the hub."""
    spec, asked = TASKS[task], []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        start = 0 if split == "train" else 100
        columns = {column: [f"{text} {column}" for text in sentences(20, start)] for column in spec.hub_text}
        return datasets.Dataset.from_dict(columns | {"label": [i % len(spec.labels) for i in range(20)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "connect_hub", lambda: None)
    loaded = load_data(task, None, few_shot=True)
    assert asked == [(spec.hub, spec.config, "train"), (spec.hub, spec.config, split)]
    assert loaded.train.texts[1] == tuple(f"our tram sang 1 times {column}" for column in spec.hub_text)
    assert (len(loaded.train), len(loaded.test)) == (20, 20 if split == "test" else 10)
    assert loaded.label_names == spec.labels


def test_mrpc_with_a_byte_order_mark(glue):
    first = load_data("mrpc", glue, few_shot=False).train.texts[0]
    assert first == ("the soup sang 0 times", "so the soup sang 0 times")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_own_folder_in_every_format(own, suffix):
    rows = [("NA", "red"), ("null", "blue"), ("3", "green"), ("so it was", "red")]
    folder = own(suffix="csv" if suffix == "parquet" else suffix, train=rows, test=rows[:1])
    if suffix == "parquet":
        for file in list(folder.iterdir()):
            table = pyarrow.Table.from_pylist([row for _, row in read_rows(file)])
            pyarrow.parquet.write_table(table, file.with_suffix(".parquet"))
            file.unlink()
    loaded = load_data(str(folder), None, few_shot=False)
    assert loaded.label_names == ("blue", "green", "red")
    assert loaded.train.texts == [("null",), ("3",), ("so it was",)]  # without the row that test holds
    assert loaded.train.labels.tolist() == [0, 1, 2]
    assert loaded.test.texts == [("NA",)]


def test_own_pairs_and_numeric_labels_in_numeric_order(own):
    rows = [(text, "and then", label) for text, label in zip(sentences(4), (10, 9, 2, 10), strict=True)]
    loaded = load_data(str(own(header="text,text_pair,label", train=rows, test=rows[:1])), None, few_shot=False)
    assert loaded.label_names == ("2", "9", "10")
    assert loaded.train.texts[0] == ("our tram sang 1 times", "and then")


def test_own_validation_file_is_kept(own):
    first, second, third = (list(zip(sentences(10, start), "ab" * 5, strict=True)) for start in (0, 10, 20))
    loaded = load_data(str(own(train=first, validation=second, test=third)), None, few_shot=True)
    train, validation, test = sample(loaded, 4, None, 0)
    assert (len(train), texts(validation), texts(test)) == (4, {t for t, _ in second}, {t for t, _ in third})


# ------------------------------------------------------------ splits


def few_shot(glue, seed=0, shots=20, per_class=None, task="sst2"):
    return sample(load_data(task, glue, few_shot=True), shots, per_class, seed)


def test_few_shot_splits_are_disjoint_and_stratified(glue):
    train, validation, test = few_shot(glue)
    assert (len(train), len(validation), len(test)) == (20, 20, 20)
    assert not texts(train) & texts(validation) | texts(train) & texts(test) | texts(validation) & texts(test)
    for split in (train, validation, test):
        assert np.bincount(split.labels).tolist() == [10, 10]


def test_splits_are_disjoint_whatever_case_and_spaces(glue):
    rows = list(sentences(40, 500))
    doubled = [row.upper().replace(" ", "  ") for row in rows]
    for split, texts_ in (("dev", rows + doubled), ("train", [*sentences(60), *doubled[:30]])):
        lines = (f"{text}\t{i % 2}" for i, text in enumerate(texts_))
        write_lines(glue / "SST-2" / f"{split}.tsv", ["sentence\tlabel", *lines])
    for splits in (few_shot(glue, shots=50), sample(load_data("sst2", glue, few_shot=False), None, None, 0)):
        keys = [{" ".join(text.split()) for text in texts(split)} for split in splits]
        assert all(keys)
        assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]


def test_a_sample_is_a_pure_function_of_its_seed(glue):
    alone = few_shot(glue, seed=3)[0]
    for seed in (5, 3, 0):  # whatever was drawn before
        np.random.seed(seed)
        last = few_shot(glue, seed=seed)[0]
        assert (last.checksum == alone.checksum) == (seed == 3)


def test_test_and_validation_do_not_depend_on_the_seed(glue):
    assert [s.checksum for s in few_shot(glue, seed=1)[1:]] == [s.checksum for s in few_shot(glue, seed=2)[1:]]


def test_the_checksum_sees_texts_and_labels():
    split = Split([("a",), ("b",)], np.array([0, 1]))
    others = [Split([("a",), ("c",)], np.array([0, 1])), Split([("a",), ("b",)], np.array([1, 1])), split.take([1, 0])]
    assert len({split.checksum, *(other.checksum for other in others)}) == 4


def test_shots_in_total_and_per_class(glue):
    assert np.bincount(few_shot(glue, task="mnli", shots=20)[0].labels).tolist() == [7, 7, 6]
    assert np.bincount(few_shot(glue, task="mnli", shots=None, per_class=4)[0].labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize("sizes, n, expected", [
    ([50, 50], 20, [10, 10]), ([90, 10], 20, [18, 2]), ([98, 1, 1], 3, [1, 1, 1]), ([98, 1, 1], 10, [8, 1, 1]),
    ([0, 30, 10], 4, [0, 3, 1]), ([5, 5], 10, [5, 5]), ([3, 3, 3], 2, [1, 1, 0]),
])  # fmt: skip
def test_allot(sizes, n, expected):
    assert allot(np.array(sizes), n).tolist() == expected


def test_full_data_cuts_validation_from_train(glue):
    train, validation, test = sample(load_data("sst2", glue, few_shot=False), None, None, 0)
    assert (len(train), len(validation), len(test)) == (108, 12, 40)  # at most a tenth of train
    assert len(texts(train) | texts(validation) | texts(test)) == 160


def test_polarity_tests_on_ten_thousand_of_its_test_set(tmp_path):
    for split, n, start in (("train", 60, 20_000), ("test", 12_000, 0)):
        rows = [f"{text}\t{i % 4 != 0:d}" for i, text in enumerate(sentences(n, start))]
        write_lines(tmp_path / "YelpPolarity" / f"{split}.tsv", ["text\tlabel", *rows])
    loaded = load_data("yelp_polarity", tmp_path, few_shot=True)
    train, validation, test = sample(loaded, 40, None, 0)
    assert (len(train), len(validation), len(test)) == (40, 20, 10_000)  # validation: what the sample leaves of train
    assert np.bincount(test.labels).tolist() == [2500, 7500]


# ------------------------------------------------------------ noise


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_label_noise_flips_exactly_this_fraction(level, classes):
    split = Split([(text,) for text in sentences(60)], np.arange(60) % classes)
    noisy = add_noise(split, "label", level, classes, seed=0)
    assert (noisy.labels != split.labels).sum() == 60 * level
    assert set(noisy.labels) <= set(range(classes))
    assert noisy.texts == split.texts


@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 1.0])
def test_word_noise_keeps_to_the_words(level):
    split = Split([(" ".join(f"w{i}" for i in range(20)), "one") for _ in range(50)], np.zeros(50, dtype=int))
    noisy = add_noise(split, "word", level, 2, seed=0)
    assert (noisy.labels == split.labels).all()
    kept = [text.split() for text, _ in noisy.texts]
    assert all(set(words) <= set(split.texts[0][0].split()) and len(words) == len(set(words)) for words in kept)
    dropped = 20 - np.mean([len(words) for words in kept])
    assert dropped == pytest.approx(20 * level / 2, abs=1.5)
    assert all(pair == "one" for _, pair in noisy.texts)  # the last word of a text stays
    moved = [words != sorted(words, key=lambda word: int(word[1:])) for words in kept]
    assert any(moved) == (level > 0)


def test_noise_is_a_pure_function_of_its_seed():
    split = demo_data().train
    checksums = [add_noise(split, kind, 0.3, 2, seed).checksum for kind in ("label", "word") for seed in (0, 1, 0)]
    assert checksums[0] == checksums[2] != checksums[1] and checksums[3] == checksums[5] != checksums[4]
