"""From files to splits: reading, sampling, noise."""

import json

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


# ------------------------------------------------------------ what is no text, no label, or would stay unread


def reads(folder):
    """The one line that load_data raises, the folder's path taken out."""
    with pytest.raises(data.Mistake) as raised:
        load_data(str(folder), None, few_shot=True)
    message = str(raised.value).replace(f"{folder}/", "")
    assert message.startswith("argument --task: ") and "\n" not in message and len(message) < 300
    return message.removeprefix("argument --task: ")


GOOD = ["the cat ran\tneg", "the dog sat\tpos", "so it is\tneg", "no it is not\tpos"]


def folder_of(tmp_path, name, content):
    """A folder whose train file is `content`, its test file a good one."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_lines(tmp_path / "test.tsv", ["text\tlabel", "what else\tneg"])
    return tmp_path


@pytest.mark.parametrize("line, message", [
    ('{"text": NaN, "label": "neg"}', "text is nan (float); expected text"),
    ('{"text": 5, "label": "neg"}', "text is 5 (int); expected text"),
    ('{"text": ["a", "b"], "label": "neg"}', "text is ['a', 'b'] (list); expected text"),
    ('{"text": {"a": 1}, "label": "neg"}', "text is {'a': 1} (dict); expected text"),
    ('{"text": true, "label": "neg"}', "text is True (bool); expected text"),
    ('{"text": " ", "label": "neg"}', "no text"),
    ('{"text": "so", "label": NaN}', "label is nan (float); expected a word or a whole number"),
    ('{"text": "so", "label": 0.5}', "label is 0.5 (float); expected a word or a whole number"),
    ('{"text": "so", "label": Infinity}', "label is inf (float); expected a word or a whole number"),
    ('{"text": "so", "label": ["neg"]}', "label is ['neg'] (list); expected a word or a whole number"),
    ('{"text": "so", "label": null}', "no label"),
    ('{"text": "so"}', " has no column label; it has text"),
    ('{"text": "so", "text": "no", "label": "neg"}', "(a key twice); expected one JSON object a line"),
    ('["so", "neg"]', "(no object); expected one JSON object a line"),
    ("[" * 100_000, "expected one JSON object a line"),
    ('{"text": "so\x1b[31m", "label": "neg"}', "so\\x1b[31m"),  # a terminal would obey it
])  # fmt: skip
def test_a_value_is_text_or_it_is_refused_with_its_line(tmp_path, line, message):
    rows = [json.dumps(dict(zip(("text", "label"), row.split("\t"), strict=True))) for row in GOOD]
    error = reads(folder_of(tmp_path, "train.jsonl", "\n".join([*rows * 600, line, *rows])))
    assert error.startswith("train.jsonl, line 2401") and message in error


@pytest.mark.parametrize("content", [
    '[\n  {"text": "so", "label": "neg"},\n  {"text": "no", "label": "pos"}\n]',  # one array, as pandas writes it
    '{\n  "text": ["so"],\n  "label": ["neg"]\n}', '[{"text": "so", "label": "neg"}]',
])  # fmt: skip
def test_json_of_another_shape_is_said(tmp_path, content):
    assert "train.jsonl, line 1: " in (error := reads(folder_of(tmp_path, "train.jsonl", content)))
    assert "expected one JSON object a line" in error


def test_columns_as_lists_are_said(tmp_path):
    content = json.dumps({"text": ["so"] * 9000, "label": ["neg"] * 9000})
    assert "line 1: text is ['so', 'so'," in reads(folder_of(tmp_path, "train.jsonl", content))


@pytest.mark.parametrize("content, message", [
    ("text,label,text\nso,neg,no\n", "train.csv has the column text twice; keep one"),
    ("text,label\nso,neg\nno,pos\ntext,label\nit,neg\n", "train.csv, line 4 is the header again"),
    ("text;label\nso;neg\nno;pos\n", "has no column text; it has text;label; csv is separated by commas, tsv by tabs"),
    ('text,label\n"so\nit is",neg\n"no,pos\n', "train.csv, line 4: unexpected end"),
    (b"text,label\nso,neg\n\xff\xfeno,pos\n", "train.csv, line 3: byte 0xff is not UTF-8; save the file as UTF-8"),
    ("text,label\nso,1\nno,1.0\nit,0\n", "train.csv has the labels 1 and 1.0, one number; write it one way"),
    ("text,label\nso,1\nno,01\n", "train.csv has the labels 01 and 1, one number; write it one way"),
    ("text,label\nso,neg\nno,pos\nit," + "x" * 999 + "\ntest,", "train.csv, line 5: no label"),
])  # fmt: skip
def test_tables_that_would_be_misread_are_said(tmp_path, content, message):
    assert message in reads(folder_of(tmp_path, "train.csv", content))


def test_a_line_end_within_quotes_counts_as_a_line(tmp_path):
    folder = folder_of(tmp_path, "train.csv", 'text,label\n"so\nit\u0085is",neg\nno,pos\n')
    assert load_data(str(folder), None, few_shot=True).train.texts == [("so\nit\u0085is",), ("no",)]


def test_whole_numbers_and_truth_values_are_labels(own):
    for labels, names in (((1.0, 0, 1, 0.0), ("0", "1")), ((True, False, True, False), ("False", "True"))):
        rows = list(zip(sentences(4), labels, strict=True))
        test = [("what else", labels[0])]
        assert load_data(str(own("jsonl", train=rows, test=test)), None, few_shot=True).label_names == names


def parquet(folder, **splits):
    for split, table in splits.items():
        datasets.Dataset.from_dict(*table).to_parquet(folder / f"{split}.parquet")
    return folder


def test_class_names_in_parquet_are_read_whatever_their_order(tmp_path):
    texts = list(sentences(6))
    first, second = (datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
                     for names in (["neg", "pos"], ["pos", "neg"]))
    parquet(tmp_path, train=({"text": texts[:4], "label": [0, 1, 0, 1]}, first),
            test=({"text": texts[4:], "label": [0, 1]}, second))
    loaded = load_data(str(tmp_path), None, few_shot=True)
    assert loaded.label_names == ("neg", "pos") and loaded.train.labels.tolist() == [0, 1, 0, 1]
    assert loaded.test.labels.tolist() == [1, 0]
    parquet(tmp_path, train=({"text": texts[:4], "label": [0, 1, -1, 1]}, first))  # the hub's "no label"
    assert "train.parquet, line 3: no label" in reads(tmp_path)


@pytest.mark.parametrize("texts, message", [
    ([b"so", b"no"], "line 1: text is b'so' (bytes); expected text"), ([["so"], ["no"]], "(list)"),
    ([1.5, 2.5], "text is 1.5 (float)"), ([None, "so"], "line 1: no text"),
])  # fmt: skip
def test_parquet_of_other_types_is_refused(tmp_path, texts, message):
    table = pyarrow.table({"text": texts, "label": ["neg", "pos"]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    write_lines(tmp_path / "test.tsv", ["text\tlabel", "what else\tneg"])
    assert message in reads(tmp_path)


def test_a_date_beyond_pythons_is_said_and_one_in_another_column_does_not_matter(tmp_path):
    write_lines(tmp_path / "test.tsv", ["text\tlabel", "what else\tneg"])
    dates = pyarrow.array([10**16, 0], pyarrow.timestamp("ms"))
    table = pyarrow.table({"text": ["so", "no"], "label": ["neg", "pos"], "date": dates})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert len(load_data(str(tmp_path), None, few_shot=True).train) == 2
    pyarrow.parquet.write_table(pyarrow.table({"text": dates, "label": ["neg", "pos"]}), tmp_path / "train.parquet")
    assert "train.parquet cannot be read as parquet" in reads(tmp_path)


@pytest.mark.parametrize("name", ["dev", "valid", "val"])
def test_validation_by_its_other_names(own, name):
    first, second, third = (list(zip(sentences(10, start), "ab" * 5, strict=True)) for start in (0, 10, 20))
    loaded = load_data(str(own(train=first, test=third, **{name: second})), None, few_shot=True)
    assert texts(loaded.validation) == {t for t, _ in second}


def test_a_file_that_would_stay_unread_is_said(own):
    rows = [("so", "a"), ("not", "b")]
    folder = own(train=rows, dev=[("it is", "a")], validation=[("no", "b")], test=[("what else", "a")])
    assert "dev.csv and validation.csv are both there; keep one" in reads(folder)
    (folder / "dev.csv").unlink()
    (folder / "validation.csv").rename(folder / "validation.json")
    assert "validation.json would stay unread; expected validation with .tsv, .csv, .jsonl, .parquet" in reads(folder)


def test_a_pair_in_one_file_alone_is_said(own, tmp_path):
    folder = own(train=[("so", "a"), ("not", "b")], test=[("what else", "a")])
    write_lines(folder / "test.csv", ["text,text_pair,label", "so,and so,a"])
    assert "train.csv, line 2: no text_pair, but test.csv, line 2 has one" in reads(folder)


def test_an_emptied_split_says_why(own):
    rows = [(text, i % 2) for i, text in enumerate(sentences(40))]
    other = list(zip(sentences(4, 900), "0101", strict=True))
    assert "every text of train is in test, too" in reads(own(train=rows, test=rows))
    assert "every text of train is in validation, too" in reads(own(train=rows, validation=rows, test=other))
    assert "every text of validation is in test, too" in reads(own(train=rows, validation=other, test=other))
    (own(train=rows, test=other) / "validation.csv").unlink()
    alike = own(train=[("The  same", i % 2) for i in range(40)], test=other)
    with pytest.raises(data.Mistake, match="too much alike to cut validation from them"):
        load_data(str(alike), None, few_shot=False)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_not_read_is_told(tmp_path, capsys, suffix):
    for split, start in (("train", 0), ("test", 900)):
        columns = {"text": list(sentences(40, start)), "label": ["a", "b"] * 20, "textpair": ["misspelt"] * 40}
        write = {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[suffix]
        getattr(datasets.Dataset.from_dict(columns), write)(tmp_path / f"{split}.{suffix}")
    load_data(str(tmp_path), None, few_shot=True)
    assert f"not read from {tmp_path / 'train'}.{suffix}: textpair (the second" in capsys.readouterr().err


def test_what_validation_takes_with_it_is_told(own, capsys):
    rows = [(text.swapcase() if i % 2 else text, i % 2) for text in sentences(40) for i in range(2)]
    train, validation, _, _ = load_data(str(own(train=rows, test=[("a", 0), ("b", 1)] * 4)), None, few_shot=False)
    told = capsys.readouterr().err
    assert 0 < len(rows) - len(train) - len(validation) == int(told.split(": ")[1].split()[0])


def test_validation_never_takes_the_only_example_of_a_class(own):
    rows = [(text, 0) for text in sentences(60)] + [("one of its kind", 1)]
    for i in range(5):
        folder = own(train=[*rows, (f"another kind {i}", 2)], test=list(zip(sentences(30, 900), [0] * 30, strict=True)))
        train, validation, _ = sample(load_data(str(folder), None, few_shot=False), None, None, 0)
        assert np.bincount(train.labels, minlength=3)[1:].tolist() == [1, 1] and set(validation.labels) == {0}


def test_sharing_out_is_by_largest_remainder_one_at_a_time():
    """The definition, a place at a time, on random sizes."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 40, rng.integers(1, 9))
        n, leave = int(rng.integers(0, sizes.sum() + 2)), int(rng.integers(0, 3))
        available = np.maximum(sizes - leave, 0)
        shares, quotas = np.zeros_like(sizes), sizes * n / max(sizes.sum(), 1)
        for _ in range(min(n, available.sum())):
            claims = quotas - shares + n * (shares == 0)
            claims[shares == available] = -np.inf
            shares[np.argmax(claims)] += 1
        assert allot(sizes, n, leave).tolist() == shares.tolist()


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
