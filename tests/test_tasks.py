"""Tests of the tasks: GLUE's files, folders of the user, the hub, and texts for `eval.py predict`."""

import json
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conftest import sentences, write_lines
from parts import tasks
from parts.data import sample
from parts.errors import UserError
from parts.tasks import TASKS, find_files, load_data, read_texts


def texts(split):
    return {" ".join(row).lower() for row in split.texts}


# ------------------------------------------------------------ GLUE


def test_texts_of_glue_are_read_as_they_are(glue):
    odd = ['"she said', 'a " in the middle', "one\u0085cell", "so\u2028is this", "null", "NA", "5", "nan"]
    write_lines(glue / "SST-2" / "train.tsv", ["sentence\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(odd))])
    train = load_data("sst2", glue, few_shot=False).train
    assert train.texts == [(text,) for text in odd]
    assert train.labels.tolist() == [0, 1] * 4


def test_carriage_returns_in_glue(glue):
    """At the end of a line they belong to the line end. In a text they are spaces."""
    write_lines(glue / "SST-2" / "train.tsv", ["sentence\tlabel\r", "a b\t0\r", "c\rd\t1\r"])
    train = load_data("sst2", glue, few_shot=False).train
    assert (train.texts, train.labels.tolist()) == ([("a b",), ("c d",)], [0, 1])


def test_cola_has_no_header(glue):
    train = load_data("cola", glue, few_shot=True).train
    assert len(train) == 120
    assert train.texts[1] == ("our tram sang 1 times",)
    assert train.labels[:3].tolist() == [0, 1, 0]


def test_columns_and_label_order_of_mnli(glue):
    loaded = load_data("mnli", glue, few_shot=False)
    assert loaded.train.texts[2] == ("his sister sang 2 times", "indeed his sister sang 2 times")
    assert loaded.label_names == ("entailment", "neutral", "contradiction")
    assert loaded.train.labels[:4].tolist() == [0, 1, 2, 0]  # gold_label, not label1


def test_mrpc_has_a_byte_order_mark(glue):
    first = load_data("mrpc", glue, few_shot=False).train.texts[0]
    assert first == ("the soup sang 0 times", "so the soup sang 0 times")


def test_incomplete_lines_of_glue_are_skipped_and_counted(glue, capsys):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = ["1\t1\t2\tso\tand so\t1", "2\t1\t2\tno", "3\t1\t2\tor not\t\t0", "4\t1\t2\ta\tb\t ", "5\t1\t2\ta\tb\t1\t1"]
    write_lines(glue / "QQP" / "train.tsv", [header, *rows])
    write_lines(glue / "QQP" / "dev.tsv", [header, "1\t1\t2\ta\tb\t1"])
    assert load_data("qqp", glue, few_shot=False).train.texts == [("so", "and so"), ("or not", "")]
    assert f"3 of 5 lines in {glue / 'QQP' / 'train.tsv'} are incomplete and were skipped" in capsys.readouterr().err


def test_errors_in_files_of_glue(glue):
    file = glue / "SST-2" / "train.tsv"
    for rows, message in ((["text\tlabel", "a\t0"], "line 1 has no column sentence; rename the column text"),
                          (["sentence\tlabel", "a\t0", "no", "b\t2"], "row 4: the label 2 is not one of the classes"),
                          (["sentence\tlabel"], "has no rows")):
        write_lines(file, rows)
        with pytest.raises(UserError) as raised:
            load_data("sst2", glue, few_shot=True)
        assert str(raised.value).startswith(f"argument --data-dir: {file}") and message in str(raised.value)


def test_few_shots_divide_the_official_validation_set(glue):
    first, second = (sample(load_data("sst2", glue, few_shot=True), 20, None, seed) for seed in (1, 2))
    assert [len(split) for split in first] == [20, 20, 20]
    assert [np.bincount(split.labels).tolist() for split in first] == [[10, 10]] * 3
    assert len(set().union(*map(texts, first))) == 60
    assert [split.checksum for split in first[1:]] == [split.checksum for split in second[1:]]


def test_all_of_train_keeps_the_official_validation_set_for_the_test(glue):
    loaded = load_data("sst2", glue, few_shot=False)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (108, 12, 40)
    assert len(set().union(*map(texts, loaded[:3]))) == 160


def test_polarity_tasks_use_ten_thousand_test_examples(tmp_path):
    for split, n, start in (("train", 60, 20_000), ("test", 12_000, 0)):
        rows = [f"{text}\t{i % 4 != 0:d}" for i, text in enumerate(sentences(n, start))]
        write_lines(tmp_path / "YelpPolarity" / f"{split}.tsv", ["text\tlabel", *rows])
    loaded = load_data("yelp_polarity", tmp_path, few_shot=True)
    assert [len(split) for split in sample(loaded, 40, None, 0)] == [40, 20, 10_000]
    assert np.bincount(loaded.test.labels).tolist() == [2500, 7500]


@pytest.mark.parametrize("task, data_dir, message", [
    ("stsb", None, "argument --task: stsb is regression"), ("STS-B", None, "argument --task: STS-B is regression"),
    ("nonsense", None, "argument --task: nonsense is neither a folder nor one of demo, sst2"),
    ("demo", ".", "argument --data-dir: needs a task of sst2,"),
    ("sst2", "/nowhere", "argument --data-dir: no file /nowhere/SST-2/train.tsv; expected GLUE's layout"),
])
def test_errors_of_the_flags(task, data_dir, message):
    with pytest.raises(UserError, match=message):
        find_files(task, data_dir)


# ------------------------------------------------------------ the hub


@pytest.mark.parametrize(
    "task, split", [("sst2", "validation"), ("mnli", "validation_matched"), ("yelp_polarity", "test")]
)
def test_columns_and_splits_of_the_hub(monkeypatch, task, split):
    """The Dataset class of the hub replaces the hub."""
    spec, asked = TASKS[task], []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        start = 0 if split == "train" else 100
        columns = {column: [f"{text} {column}" for text in sentences(20, start)] for column in spec.hub_text}
        return datasets.Dataset.from_dict(columns | {"label": [i % len(spec.labels) for i in range(20)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "connect_hub", lambda: None)
    loaded = load_data(task, None, few_shot=True)
    assert asked == [(spec.hub, spec.config, "train"), (spec.hub, spec.config, split)]
    assert loaded.train.texts[1] == tuple(f"our tram sang 1 times {column}" for column in spec.hub_text)
    assert (len(loaded.train), len(loaded.test)) == (20, 20 if split == "test" else 10)
    assert loaded.label_names == spec.labels


def test_a_task_without_the_hub_names_data_dir(monkeypatch):
    import huggingface_hub

    def load_dataset(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "connect_hub", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as raised:
        load_data("sst2", None, few_shot=True)
    assert str(raised.value).startswith("argument --task: the hub cannot be reached")
    assert "nyu-mll/glue" in str(raised.value) and "give --data-dir" in str(raised.value)


# ------------------------------------------------------------ folders of the user


ROWS = [("NA", "red"), ("null", "blue"), ("3", "green"), ("so it was", "red")]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_a_folder_in_every_format(own, tmp_path, suffix):
    if suffix == "parquet":
        (tmp_path / "own").mkdir()
        for name, rows in (("train", ROWS), ("test", ROWS[:1])):
            table = pyarrow.table(dict(zip(("text", "label"), zip(*rows, strict=True), strict=True)))
            pyarrow.parquet.write_table(table, tmp_path / "own" / f"{name}.parquet")
    else:
        own(suffix, train=ROWS, test=ROWS[:1])
    loaded = load_data(str(tmp_path / "own"), None, few_shot=False)
    assert loaded.label_names == ("blue", "green", "red")
    assert loaded.train.texts == [("null",), ("3",), ("so it was",)]  # test holds the first row
    assert loaded.train.labels.tolist() == [0, 1, 2]
    assert loaded.test.texts == [("NA",)]


@pytest.mark.parametrize("labels, names", [
    ("10 9 2 10", ("2", "9", "10")), ("b a B 1", ("1", "B", "a", "b")), ("7 007 1 1", ("1", "007", "7")),
    ("Inf Infinity nan Inf", ("Inf", "Infinity", "nan")), ("1 1.0 01 1", ("01", "1", "1.0")),
    ("-1 0 1 -1", ("-1", "0", "1")),
])
def test_labels_are_words_in_order(own, labels, names):
    rows = list(zip(sentences(4), labels.split(), strict=True))
    loaded = load_data(str(own(train=rows, test=[("so", rows[0][1])])), None, few_shot=True)
    assert loaded.label_names == names
    assert [loaded.label_names[label] for label in loaded.train.labels] == labels.split()


def test_class_names_are_matched_across_files(tmp_path):
    for split, names, start in (("train", ["neg", "pos"], 0), ("test", ["pos", "neg"], 9)):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        columns = {"text": list(sentences(4, start)), "label": [0, 1, 0, 1]}
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / f"{split}.parquet")
    loaded = load_data(str(tmp_path), None, few_shot=True)
    assert loaded.label_names == ("neg", "pos") and loaded.train.labels.tolist() == [0, 1, 0, 1]
    assert loaded.test.labels.tolist() == [1, 0, 1, 0]


def test_labels_are_equal_in_both_unicode_forms(own):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    loaded = load_data(str(own(train=[("a", decomposed), ("b", "tea")], test=[("c", composed)])), None, few_shot=True)
    assert loaded.label_names == (composed, "tea") and loaded.test.labels.tolist() == [0]


def test_pairs(own):
    rows = [(label, "and then", text) for text, label in zip(sentences(4), "abab", strict=True)]
    loaded = load_data(str(own(header="label,text_pair,text", train=rows, test=rows[:1])), None, few_shot=False)
    assert loaded.train.texts[0] == ("our tram sang 1 times", "and then")


@pytest.mark.parametrize("name", ["validation", "dev", "valid", "val", "Validation", "DEV"])
def test_the_validation_file_may_have_several_names(own, name):
    first, second, third = (list(zip(sentences(10, start), "ab" * 5, strict=True)) for start in (0, 10, 20))
    folder = own(Train=first, TEST=third, **{name: second})
    train, validation, test = sample(load_data(str(folder), None, few_shot=True), 4, None, 0)
    assert (len(train), texts(validation), texts(test)) == (4, {t for t, _ in second}, {t for t, _ in third})


def test_files_and_columns_that_are_not_read_are_listed(own, capsys):
    header, rows = "text,label,textpair,", [("so", "a", "x", ""), ("no", "b", "x", "")]
    folder = own(header=header, train=rows, test=[("it", "a", "x", "")], eval=rows)
    for name in ("more.tsv", "x.json", "README.md"):
        (folder / name).touch()
    load_data(str(folder), None, few_shot=True)
    assert capsys.readouterr().err.splitlines() == [
        f"note: these files in {folder} are not used: eval.csv, more.tsv, x.json",
        *(f"note: these columns of {folder}/{name}.csv are not used: textpair, (no name). A second text must have the "
          "column name text_pair" for name in ("train", "test")),
    ]


# ------------------------------------------------------------ folders that must be corrected

GOOD = "text,label\na,0\nb,1\n"


def error(folder, **files):
    """Writes the files, where _ in a name stands for a dot. Returns the error of load_data, without the path."""
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_data(str(folder), None, few_shot=True)
    message = str(raised.value).replace(f"{folder}/", "")
    assert message.startswith("argument --task: ") and "\n" not in message and "\x1b" not in message
    return message.removeprefix("argument --task: ")


@pytest.mark.parametrize("train, test, message", [
    ("text,label\n", GOOD, "train.csv has no rows"),
    (GOOD, "text,label\n", "test.csv has no rows"),
    ("sentence,label\na,0\nb,1\n", GOOD, "train.csv, line 1 has no column text; rename the column sentence to text"),
    (GOOD, "text,label\na,2\n", "test.csv, row 2: the label 2 is not one of the classes 0, 1"),
    ("text,label\na,0\nb,0\n", GOOD, "train.csv has only the label 0; expected two or more classes"),
    ("text,label\na,0\n,\nc,1\n", GOOD, "train.csv, row 3 has no text"),
    ("text,label\na,0\nb, \nc,1\n", GOOD, "train.csv, row 3 has no label"),
    ("text,label\na,0\nb\nc,1\n", GOOD, "train.csv, row 3: the number of fields is 1, but the header has 2 columns"),
    ("text,label\na,0,1\nb,0,1\n", GOOD, "train.csv, row 2: the number of fields is 3, but the header has 2"),
    ("text,label\nso,neg\ntext,label\nit,neg\n", GOOD, "train.csv, row 3 is the header again; delete the row"),
    ("text,label\na,0\nb,1\x1b[31m\n", "text,label\nc,2\x1b[31m\n", "test.csv, row 2: the label 2\\x1b[31m is not"),
    ("text,text_pair,label\na,b,0\na,c,1\n", GOOD, "train.csv has a column text_pair, but test.csv has none"),
    (GOOD, "text,text_pair,label\na,,0\n", "test.csv, row 2 has no text_pair"),
])
def test_files_that_must_be_corrected(tmp_path, train, test, message):
    assert error(tmp_path, train_csv=train, test_csv=test).startswith(message)


def test_values_missing_in_other_formats(tmp_path):
    lines = '{"text": "a", "label": "b"}\n' * 2
    null = lines + '{"text": null, "label": "b"}\n'
    assert error(tmp_path, train_jsonl=null, test_csv=GOOD) == "train.jsonl, row 3 has no text"
    missing = lines + '{"text": "a"}\n'
    assert error(tmp_path, train_jsonl=missing) == "train.jsonl, row 3 has no label"
    pair = lines + '{"text": "a", "label": "b", "text_pair": "c"}\n'
    assert error(tmp_path, train_jsonl=pair) == "train.jsonl, row 1 has no text_pair"
    tsv = "text\tlabel\na\tb\tc\n"
    (tmp_path / "train.jsonl").unlink()
    assert error(tmp_path, train_tsv=tsv).endswith("remove tabs from texts, or correct the header")


@pytest.mark.parametrize("files, message", [
    ({"test.csv": GOOD}, "has no train file (found: test.csv); expected train.tsv, train.csv, train.jsonl"),
    ({"train.csv": GOOD}, "has no test file (found: train.csv); expected test.tsv"),
    ({}, "has no train file (found: nothing)"),
    ({"train.json": "[]"}, "has no train file (found: train.json); expected train.tsv, train.csv, train.jsonl"),
    ({"train.csv.gz": ""}, "has no train file (found: train.csv.gz); expected train.tsv, train.csv"),
    ({"train.txt": "a"}, "has no train file (found: train.txt); expected"),
    ({"neg.txt": "a", "pos.txt": "b"}, "has no train file (found: neg.txt, pos.txt); expected train.tsv"),
    ({"train.csv": GOOD, "test.csv": GOOD, "dev.json": ""}, "has no validation file (found: dev.json); expected"),
    ({"train.csv": GOOD, "TRAIN.tsv": "", "test.csv": GOOD}, "TRAIN.tsv and train.csv are both train files; keep one"),
    ({"test.csv": GOOD, "dev.csv": GOOD, "val.csv": "", "train.csv": GOOD}, "dev.csv and val.csv are both validation"),
    ({"dataset_dict.json": "{}"}, "save_to_disk wrote this folder; write each split with to_parquet"),
    ({"SST-2/train.tsv": "sentence\tlabel\n"}, "for a folder in GLUE's layout give --task sst2 --data-dir {}"),
])
def test_folders_in_another_layout(tmp_path, files, message):
    for name, content in files.items():
        write_lines(tmp_path / name, content.splitlines())
    assert message.format(tmp_path) in error(tmp_path)


def test_a_folder_of_glue_given_as_task(glue):
    hint = f"for a folder of GLUE give --task sst2 --data-dir {glue}"
    assert hint in error(glue / "SST-2")  # it has no test file
    assert hint in error(glue / "SST-2", test_tsv="index\tsentence\n0\tso\n")


# ------------------------------------------------------------ texts for predict


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_of_text(tmp_path, capsys, newline, end):
    file = tmp_path / "texts"
    file.write_bytes(("\ufeffso it is\n\n \nno\u0085, \"it is\n" + "NA" + end).replace("\n", newline).encode())
    assert read_texts(file) == [("so it is",), ("no\u0085, \"it is",), ("NA",)]
    assert capsys.readouterr().err == f"note: 2 blank line(s) in {file} were skipped\n"


def test_lines_of_two_texts(tmp_path, capsys):
    file = tmp_path / "texts.txt"
    write_lines(file, ["so\tno", "a b\tc"])
    assert read_texts(str(file)) == [("so", "no"), ("a b", "c")] and capsys.readouterr().err == ""


@pytest.mark.parametrize("content, message", [
    ("", "has no texts; expected one per line"), ("\n \n", "has no texts"), ("so\na\tb\n", "the line a b has 1 tab(s)"),
    ("so\tno\na\n", "the line a has 0 tab(s)"), ("so\tno\tor\n", "the line so no or has 2 tab(s)"),
    ("so\t\nno\tor\n", "the line so |  lacks one text of its pair"), (" \tno\n", "lacks one text of its pair"),
])
def test_lines_that_must_be_corrected(tmp_path, content, message):
    (tmp_path / "texts").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_texts(tmp_path / "texts")


@pytest.mark.parametrize("first", ["text", "text,label", "text\ttext_pair", '{"text": "so it is"}'])
def test_a_table_without_its_ending_is_reported(tmp_path, capsys, first):
    write_lines(tmp_path / "texts", [first, "texts, so\tit is" if "\t" in first else "texts, so it is"])
    assert len(read_texts(tmp_path / "texts")) == 2
    assert "texts begins like a table, but is read as one text per line; a table needs" in capsys.readouterr().err
    write_lines(tmp_path / "texts", ["texts, so it is"])
    read_texts(tmp_path / "texts")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["texts.json", "texts.ndjson", "texts.csv.gz"])
def test_a_format_that_is_not_read_has_no_texts(tmp_path, name):
    write_lines(tmp_path / name, ['[{"text": "so it is"}]'])
    with pytest.raises(UserError, match=re.escape(f"{name} has a format that is not read; expected .tsv, .csv, ")):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_texts_of_a_table(tmp_path, suffix):
    rows = [{"text_pair": "x", "text": "so it is"}, {"text_pair": "y", "text": "NA"}]
    file = tmp_path / f"texts.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == "jsonl":
        write_lines(file, map(json.dumps, rows))
    else:
        separator = "," if suffix == "csv" else "\t"
        write_lines(file, [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)])
    assert read_texts(file) == [("so it is", "x"), ("NA", "y")]


def test_a_table_without_labels_or_with_other_columns(tmp_path, capsys):
    file = tmp_path / "texts.csv"
    write_lines(file, ["text", "so", '"a, b"'])
    assert read_texts(file) == [("so",), ("a, b",)] and capsys.readouterr().err == ""
    write_lines(file, ["label,text", "0,so"])
    assert read_texts(file) == [("so",)]
    assert capsys.readouterr().err.startswith(f"note: these columns of {file} are not used: label. ")
    write_lines(file, ["sentence", "so"])
    with pytest.raises(UserError, match="line 1 has no column text; rename the column sentence to text"):
        read_texts(file)
