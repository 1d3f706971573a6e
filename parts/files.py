"""Reads the needed columns of tsv, csv, jsonl and parquet files with pyarrow, and ignores all other columns.

Error messages number the rows of a file from 1, and do not count blank lines. The header of a tsv or csv file is row 1.
"""

import contextlib
import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from parts.errors import UserError, first_line, one_line

FORMATS = {".tsv": "columns separated by tabs", ".csv": "columns separated by commas",
           ".jsonl": "one JSON object per line", ".parquet": "a parquet file"}


class Table(NamedTuple):
    names: list[str]  # names of all columns
    columns: dict[str, list]  # values of the needed columns; None is a missing value
    numbers: list[int]  # row number of each row in the file
    bad_rows: list  # pyarrow's description of each row with too few or too many fields


def read_table(file: Path, needed: tuple[str, ...], header: tuple[str, ...] | None = None,
               hint: str | None = None) -> Table:
    """Reads the needed columns of a file, and the column text_pair if it exists.

    If the file has no header line, the tuple `header` has the column names. The `hint` tells the user what to do if no
    column is named "text".
    """
    suffix, wanted = file.suffix.lower(), (*needed, "text_pair")
    read = {".jsonl": read_jsonl, ".parquet": read_parquet}.get(suffix, read_delimited)
    try:
        names, table, bad_rows = read(file, wanted, header)
        check_header(file, names, needed, hint)
        if suffix == ".csv":
            check_quotes(file)
        metadata = table.schema.metadata
        columns = {name: to_strings(name, table.column(name), metadata) for name in wanted if name in names}
    except UserError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types
        if suffix != ".parquet":
            decode(file)  # if the file is not UTF-8, raises a UserError with the line number
        reason = re.sub(r"in row (\d+)", lambda match: f"in row {int(match[1]) + 1}", first_line(error))
        raise UserError(f"{file} cannot be read as {suffix[1:]} ({reason}); expected {FORMATS[suffix]}") from None
    start, skipped = 1 + (read is read_delimited and not header), {row.number for row in bad_rows}
    numbers = [number for number in range(start, start + len(table) + len(bad_rows)) if number not in skipped]
    return Table(names, columns, numbers, bad_rows)


def decode(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = raw[: error.start].count(b"\n") + 1, raw[error.start]
        raise UserError(f"{file}, line {line}: byte {byte:#x} is not UTF-8; save the file as UTF-8") from None


def check_header(file: Path, names: list[str], needed: tuple[str, ...], hint: str | None) -> None:
    """Checks that each needed column exists exactly once. The error message tells the user how to change the header."""
    where = str(file) if file.suffix.lower() == ".parquet" else f"{file}, line 1"
    if repeated := [name for name in (*needed, "text_pair") if names.count(name) > 1]:
        raise UserError(f"{where} has the column {repeated[0]} twice; keep one")
    if not (missing := [name for name in needed if name not in names]):
        return
    if file.suffix.lower() != ".parquet":
        decode(file)  # raises a UserError if the file is not UTF-8, for example UTF-16
    signs = {";": "semicolons (;)", "|": "bars (|)", "\t": "tabs", ",": "commas"}
    separators = [word for sign, word in signs.items() if len(names) == 1 and sign in names[0]]
    others = [name for name in names if name not in (*needed, "text_pair")]
    similar = [name for name in others if name.strip(' "').lower() == missing[0]] or others
    if separators:
        advice = f"the separators seem to be {separators[0]}; expected {FORMATS[file.suffix.lower()]}"
    elif hint and missing[0] == "text":
        advice = hint
    elif len(similar) == 1:
        advice = f"rename the column {one_line(similar[0], 60)} to {missing[0]}"
    else:
        advice = f"rename one of its columns ({one_line(', '.join(names), 100)}) to {missing[0]}"
    raise UserError(f"{where} has no column {missing[0]}; {advice}")


def to_strings(name: str, column: Any, metadata: dict | None) -> list[str | None]:
    """Converts a column to strings. Labels may be strings, booleans, whole numbers or ClassLabel numbers."""
    if str(column.type).startswith("dictionary"):
        column = column.cast(column.type.value_type)
    if str(column.type) in ("string", "large_string", "string_view", "null"):
        return column.to_pylist()
    if name != "label" or not re.fullmatch(r"u?int\d+|bool|float|double", str(column.type)):
        expected = "words or whole numbers" if name == "label" else "text"
        raise ValueError(f"the column {name} has type {column.type}, not {expected}")
    if str(column.type) in ("float", "double"):
        column = column.cast("int64")  # raises an error for 0.5 and NaN
    numbers = column.to_pylist()
    with contextlib.suppress(ValueError, KeyError, TypeError):  # raised if the file does not come from `datasets`
        feature = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]
        if feature["_type"] == "ClassLabel":
            names = dict(enumerate(feature["names"]))
            return [names.get(number) for number in numbers]
    return [None if number is None else str(number) for number in numbers]


def read_delimited(file: Path, wanted: tuple[str, ...], header: tuple[str, ...] | None) -> tuple:
    """Reads a csv or tsv file. In tsv files, as in GLUE, quotes have no meaning and only "\\n" ends a line."""
    import pyarrow.csv

    raw, is_tsv, bad_rows = file.read_bytes(), file.suffix.lower() == ".tsv", []
    if is_tsv:
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b" ")  # pyarrow ends a line at "\r", too
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if is_tsv else (",", csv.QUOTE_MINIMAL)
    parse = pyarrow.csv.ParseOptions(
        delimiter=delimiter, quote_char=False if is_tsv else '"', newlines_in_values=not is_tsv,
        invalid_row_handler=lambda row: bad_rows.append(row) or "skip")
    strings = pyarrow.csv.ConvertOptions(include_columns=wanted, include_missing_columns=True,
                                         column_types=dict.fromkeys(wanted, pyarrow.string()))
    options = pyarrow.csv.ReadOptions(use_threads=False, block_size=2**26, column_names=header)  # row: up to 64 MiB
    table = pyarrow.csv.read_csv(pyarrow.BufferReader(raw), options, parse, strings)
    start = io.StringIO(raw[: 2**20].decode("utf-8-sig", errors="replace"), newline="")
    names = header or next(filter(None, csv.reader(start, delimiter=delimiter, quoting=quoting)))
    return names, table, bad_rows


def check_quotes(file: Path) -> None:
    """Checks that all double quotes of a csv file are closed, because pyarrow joins the rows after an open quote."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            for _ in reader:
                pass
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}; check the double quotes") from None


def read_jsonl(file: Path, wanted: tuple[str, ...], header: None) -> tuple:
    import pyarrow.json

    raw = file.read_bytes()
    example = json.loads(re.match(rb"\s*[^\n]*", raw)[0].decode("utf-8-sig"))
    if not isinstance(example, dict):
        raise ValueError("line 1 is not a JSON object")
    label_types = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    label_type = label_types.get(type(example.get("label")), pyarrow.string())
    schema = pyarrow.schema([(name, label_type if name == "label" else pyarrow.string()) for name in wanted])
    parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    options = pyarrow.json.ReadOptions(block_size=min(len(raw), 2**31 - 1))  # one block, so that row numbers are right
    table = pyarrow.json.read_json(pyarrow.BufferReader(raw), options, parse)
    later = [name for name in wanted if name not in example and table.column(name).null_count < len(table)]
    return [*example, *later], table, []


def read_parquet(file: Path, wanted: tuple[str, ...], header: None) -> tuple:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        return names, parquet.read(columns=[name for name in wanted if name in names]), []
