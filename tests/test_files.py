"""Tests of the readers for tsv, csv, jsonl and parquet files."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest

from parts.errors import UserError
from parts.files import read_table


def read(file, content, needed=("text", "label")):
    """Writes the content (bytes, text or a pyarrow table) to a file. Returns its table."""
    if isinstance(content, pyarrow.Table):
        pyarrow.parquet.write_table(content, file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(file, needed)


def error(file, content):
    """Returns the message, without the folder, if the file cannot be read."""
    with pytest.raises(UserError) as raised:
        read(file, content)
    message = str(raised.value)
    assert "\n" not in message and "\x1b" not in message and len(message.replace(str(file), "")) < 300
    return message.replace(f"{file.parent}/", "")


# ------------------------------------------------------------ csv and tsv


def test_tsv_has_no_quotes_and_only_a_newline_ends_a_line(tmp_path):
    odd = ['"she said', 'a " in the middle', "one\u0085cell", "so\u2028is this", "null", "NA", "5", "nan", "", "a,b"]
    table = read(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(odd)))
    assert table.columns == {"text": odd, "label": list(map(str, range(10)))}


def test_carriage_returns_in_tsv(tmp_path):
    table = read(tmp_path / "a.tsv", b"text\tlabel\r\na\rb\t0\r\nc d\t1\r")
    assert table.columns["text"] == ["a b", "c d"] and [label.strip() for label in table.columns["label"]] == ["0", "1"]


def test_quoted_csv(tmp_path):
    table = read(tmp_path / "a.csv", '"label","text"\n1,"so, ""it\u0085\nis"""\n\n007,5" tall\n')
    assert table.columns == {"text": ['so, "it\u0085\nis"', '5" tall'], "label": ["1", "007"]}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_line_end_and_a_byte_order_mark_in_csv(tmp_path, newline):
    table = read(tmp_path / "a.CSV", "\ufefftext,label\nNA,null\nso,Inf\n".replace("\n", newline))
    assert table.columns == {"text": ["NA", "so"], "label": ["null", "Inf"]}


def test_blank_lines_before_and_between_rows(tmp_path):
    assert read(tmp_path / "a.csv", "\n\ntext,label\n\na,b\n\n").columns == {"text": ["a"], "label": ["b"]}


def test_a_text_of_many_megabytes(tmp_path):
    text = "long " * 1_000_000
    assert read(tmp_path / "a.csv", f'text,label\n"{text}",b\n').columns["text"] == [text]


def test_bad_rows_keep_their_numbers(tmp_path):
    table = read(tmp_path / "a.csv", "text,label\na,b\nc\nd,e\nf,g,h\ni,j\n")
    assert table.numbers == [2, 4, 6]
    assert [(row.number, row.actual_columns, row.expected_columns) for row in table.bad_rows] == [(3, 1, 2), (5, 3, 2)]


@pytest.mark.parametrize("content", ['text,label\na,0\n"b,1\n', 'label,text\n0,a\n1,"b\n0,c\n1,d\n'])
def test_a_quote_that_is_not_closed(tmp_path, content):
    last = content.count("\n")
    assert f"line {last}: unexpected end of data; check the double quotes" in error(tmp_path / "a.csv", content)


def test_a_quote_that_is_closed_within_a_later_row(tmp_path):
    assert "a.csv cannot be read as csv (line 3: " in error(tmp_path / "a.csv", 'text,label\n"b,1\nhe said "hi",0\n')


@pytest.mark.parametrize("content, line", [
    (b"text,label\nso,neg\n\xff\xfeno,pos\n", 3), (b"text,label\nso,\xe9t\xe9\n", 2),
    ("text,label".encode("utf-16"), 1), ("text,label\nso,neg\nno,pos\n".encode("utf-16"), 1),
])
def test_a_byte_that_is_not_utf_8(tmp_path, content, line):
    message = error(tmp_path / "a.csv", content)
    assert f"a.csv, line {line}: byte 0x" in message and "is not UTF-8; save the file as UTF-8" in message


# ------------------------------------------------------------ the header


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "text;label\nso;neg\n", "the separators seem to be semicolons (;); expected columns separated by commas"),
    ("a.csv", '"text";"label"\n"so";"neg"\n', "the separators seem to be semicolons (;)"),
    ("a.csv", '"text"|"label"\n"so"|"neg"\n', "the separators seem to be bars (|)"),
    ("a.csv", "text\tlabel\nso\tneg\n", "the separators seem to be tabs; expected columns separated by commas"),
    ("a.tsv", "text,label\nso,neg\n", "the separators seem to be commas; expected columns separated by tabs"),
    ("a.csv", "sentence,label\nso,neg\n", "a.csv, line 1 has no column text; rename the column sentence to text"),
    ("a.csv", "Text,Label\nso,neg\n", "line 1 has no column text; rename the column Text to text"),
    ("a.tsv", '"text"\tlabel\nso\tneg\n', 'line 1 has no column text; rename the column "text" to text'),
    ("a.csv", "id,review,label\n1,so,neg\n", "rename one of its columns (id, review, label) to text"),
    ("a.csv", "text,class\nso,neg\n", "a.csv, line 1 has no column label; rename the column class to label"),
    ("a.csv", "text,label,text\nso,neg,no\n", "a.csv, line 1 has the column text twice; keep one"),
    ("a.csv", "text,label,text_pair,text_pair\nso,neg,no,no\n", "has the column text_pair twice"),
    ("a.jsonl", '{"sentence": "so", "label": "neg"}\n', "a.jsonl, line 1 has no column text; rename the"),
    ("a.parquet", pyarrow.table({"text": ["so"], "class": ["a"]}), "a.parquet has no column label; rename the"),
    ("a.parquet", pyarrow.table([["so"], ["no"], ["a"]], ["text", "text", "label"]), "has the column text twice"),
    ("a.csv", "", "a.csv cannot be read as csv (Empty CSV file)"),
])
def test_errors_of_the_header(tmp_path, name, content, message):
    assert message in error(tmp_path / name, content)


@pytest.mark.parametrize("header", ["text,label,,", "text,label,note,note", ",text,label", 'text,label,"no\nte"'])
def test_the_names_of_other_columns_do_not_matter(tmp_path, header):
    row = [name if name in ("text", "label") else "" for name in header.split(",")]
    table = read(tmp_path / "a.csv", f"{header}\n{','.join(row)}\n")
    assert table.columns == {"text": ["text"], "label": ["label"]}


def test_bytes_in_other_columns_do_not_matter(tmp_path):
    assert read(tmp_path / "a.csv", b"text,label,note\na,b,\xff\n").columns["text"] == ["a"]


# ------------------------------------------------------------ jsonl


def lines(*rows):
    return "".join(row + "\n" for row in rows)


GOOD = '{"text": "so", "label": "neg"}'


@pytest.mark.parametrize("line, message", [
    ('{"text": NaN, "label": "neg"}', "Column(/text) changed from string to number in row 2401"),
    ('{"text": 5, "label": "neg"}', "Column(/text) changed from string to number in row 2401"),
    ('{"text": ["a", "b"], "label": "neg"}', "Column(/text) changed from string to array in row 2401"),
    ('{"text": {"a": 1}, "label": "neg"}', "Column(/text) changed from string to object in row 2401"),
    ('{"text": true, "label": "neg"}', "Column(/text) changed from string to boolean in row 2401"),
    ('{"text": "so", "label": NaN}', "Column(/label) changed from string to number in row 2401"),
    ('{"text": "so", "label": ["neg"]}', "Column(/label) changed from string to array in row 2401"),
    ('{"text": "so", "text": "no", "label": "neg"}', "Column(/text) was specified twice in row 2401"),
    ('["so", "neg"]', "expected one JSON object per line"),
    ('{"text": "so\\ud83d", "label": "neg"}', "in row 2401"),
    ('{"text": "a"', "in row 2401"),
])
def test_other_values_in_jsonl(tmp_path, line, message):
    assert message in error(tmp_path / "a.jsonl", lines(*[GOOD] * 2400, line, GOOD))


@pytest.mark.parametrize("content", [
    '[\n  {"text": "so", "label": "neg"},\n  {"text": "no", "label": "pos"}\n]', f"[{GOOD}]", "5\n", "[" * 100_000, "",
    '{\n  "text": ["so"],\n  "label": ["neg"]\n}', json.dumps({"text": ["so"] * 9000, "label": ["neg"] * 9000}),
])
def test_json_of_another_shape(tmp_path, content):
    assert "expected one JSON object per line" in error(tmp_path / "a.jsonl", content)


@pytest.mark.parametrize("labels, expected", [
    ("1.0 0 1", ["1", "0", "1"]), ("7 -7 9007199254740993", ["7", "-7", "9007199254740993"]),
    ("true false true", ["True", "False", "True"]), ('"007" "7" "1.0"', ["007", "7", "1.0"]),
    ('"2020-01-01" "NA" null', ["2020-01-01", "NA", None]),
])
def test_labels_in_jsonl(tmp_path, labels, expected):
    rows = (f'{{"text": "2020-01-01", "label": {label}}}' for label in labels.split())
    table = read(tmp_path / "a.jsonl", "\ufeff" + lines(*rows))
    assert table.columns == {"text": ["2020-01-01"] * 3, "label": expected}


@pytest.mark.parametrize("labels", ["0.5 1", "1 0.5", "1.0 NaN", "1.0 Infinity", '1 "1"', "true 1"])
def test_labels_that_are_neither_words_nor_whole_numbers(tmp_path, labels):
    rows = (f'{{"text": "so", "label": {label}}}' for label in labels.split())
    assert "a.jsonl cannot be read as jsonl" in error(tmp_path / "a.jsonl", lines(*rows))


def test_other_keys_in_jsonl_do_not_matter(tmp_path):
    deep = '{"x": 1, "x": "' + '", "y": ' + "[" * 10_000 + "]" * 10_000 + ', "text": "a", "label": "b"}'
    table = read(tmp_path / "a.jsonl", lines('{"text": "a", "x": {}, "label": "b", "": 1}', deep))
    assert table.columns == {"text": ["a", "a"], "label": ["b", "b"]} and table.names == ["text", "x", "label", ""]


def test_a_key_that_only_a_later_row_has(tmp_path):
    later = '{"text": "a", "text_pair": "c", "label": "b"}'
    assert read(tmp_path / "a.jsonl", lines(GOOD, later)).columns["text_pair"] == [None, "c"]
    assert "text_pair" not in read(tmp_path / "a.jsonl", lines(GOOD, GOOD)).columns


# ------------------------------------------------------------ parquet


@pytest.mark.parametrize("texts, found", [
    ([b"so"], "binary"), ([["so"]], "list"), ([1.5], "double"), ([5], "int64"), ([True], "bool"),
    ([{"a": 1}], "struct"),
    (pyarrow.array([10**16], pyarrow.timestamp("ms")), "timestamp"),
])
def test_columns_of_other_types_are_rejected(tmp_path, texts, found):
    message = error(tmp_path / "a.parquet", pyarrow.table({"text": texts, "label": ["neg"]}))
    assert "a.parquet cannot be read as parquet (the column text has type " + found in message


@pytest.mark.parametrize("labels", [
    [0.5], [float("nan")], [float("inf")], [b"a"], [["a"]], [datetime.date(2020, 1, 1)],
])
def test_label_columns_of_other_types_are_rejected(tmp_path, labels):
    assert "a.parquet cannot be read" in error(tmp_path / "a.parquet", pyarrow.table({"text": ["a"], "label": labels}))


@pytest.mark.parametrize("type_, labels, expected", [
    ("float", [1.0, 0.0, None], ["1", "0", None]), ("int8", [7, -1, 0], ["7", "-1", "0"]),
    ("bool", [True, False, None], ["True", "False", None]), ("large_string", ["007", "7", ""], ["007", "7", ""]),
    ("uint64", [2**64 - 1, 0, 1], [str(2**64 - 1), "0", "1"]),
])
def test_labels_in_parquet(tmp_path, type_, labels, expected):
    column = pyarrow.array(labels, type_)
    texts = pyarrow.array(["NA", "b", None]).dictionary_encode()
    table = read(tmp_path / "a.parquet", pyarrow.table({"text": texts, "label": column}))
    assert table.columns == {"text": ["NA", "b", None], "label": expected} and list(table.numbers) == [1, 2, 3]


def huggingface(table, features):
    """Adds the metadata with which `datasets` stores features."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_class_names_in_parquet(tmp_path):
    table = pyarrow.table({"text": ["a", "b", "c", "d"], "label": [1, 0, -1, None], "x": [[1]] * 4})
    features = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "x": {"_type": "FromTheFuture"}}
    columns = read(tmp_path / "a.parquet", huggingface(table, features)).columns
    assert columns["label"] == ["pos", "neg", None, None]
    columns = read(tmp_path / "a.parquet", huggingface(table, {"label": {"_type": "FromTheFuture"}})).columns
    assert columns["label"] == ["1", "0", "-1", None]
    broken = table.replace_schema_metadata({"huggingface": "{"})
    assert read(tmp_path / "a.parquet", broken).columns["label"] == ["1", "0", "-1", None]


def test_other_columns_in_parquet_do_not_matter(tmp_path):
    names = ["text", "note", "note", "map", "date", "text.x", "", "label"]
    pairs = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    columns = [["so"], [1], ["b"], pairs, pyarrow.array([10**16], pyarrow.timestamp("ms")), [b"a"], [None], ["neg"]]
    table = read(tmp_path / "a.parquet", pyarrow.table(columns, names))
    assert table.columns == {"text": ["so"], "label": ["neg"]} and table.names == names


def test_a_file_that_is_not_parquet(tmp_path):
    assert "a.parquet cannot be read as parquet" in error(tmp_path / "a.parquet", b"PAR1 no")
