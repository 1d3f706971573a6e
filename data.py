"""Where rows come from: tasks, files and the hub, splits, k-shot samples, noise, the demo's sentences.

    data = load_data("sst2", "glue", few_shot=True)
    train, validation, test = sample(data, shots=20, shots_per_class=None, seed=0)

A row of text becomes one of a `Split`; what a model makes of it is not known here. The records of finished runs are
rows, too: the last section reads them.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """A text classification task: where it lives on the hub, and in a folder of the classic GLUE layout."""

    folder: str
    config: str | None  # on the hub
    hub_text: tuple[str, ...]  # columns
    labels: tuple[str, ...]  # in the order of their numbers
    text: tuple[str, ...] = ()  # columns of the local file, where they are others than on the hub
    label: str = "label"
    test: str = "dev"  # local file; GLUE keeps its test labels, so its validation set serves for test
    header: tuple[str, ...] | None = None  # for a local file without
    hub: str = "nyu-mll/glue"


SENTENCE, PAIR, POLARITY = ("sentence",), ("sentence1", "sentence2"), ("negative", "positive")
ENTAILMENT, NLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
TASKS = {
    "sst2": Task("SST-2", "sst2", SENTENCE, POLARITY),
    "cola": Task("CoLA", "cola", SENTENCE, ("unacceptable", "acceptable"),
                 header=("source", "label", "mark", "sentence")),
    "mrpc": Task("MRPC", "mrpc", PAIR, ("not_equivalent", "equivalent"), ("#1 String", "#2 String"), "Quality"),
    "rte": Task("RTE", "rte", PAIR, ENTAILMENT),
    "qnli": Task("QNLI", "qnli", ("question", "sentence"), ENTAILMENT),
    "mnli": Task("MNLI", "mnli", ("premise", "hypothesis"), NLI, PAIR, "gold_label", "dev_matched"),
    "qqp": Task("QQP", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), label="is_duplicate"),
    "wnli": Task("WNLI", "wnli", PAIR, ("not_entailment", "entailment")),
    "amazon_polarity": Task("AmazonPolarity", None, ("content",), POLARITY, ("text",), test="test",
                            hub="fancyzhx/amazon_polarity"),
    "yelp_polarity": Task("YelpPolarity", None, ("text",), POLARITY, test="test", hub="fancyzhx/yelp_polarity"),
}
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLIT_SEED = 0  # cuts test and validation, the same for every --seed


# ------------------------------------------------------------ what the user can mend


class Mistake(Exception):
    """What the user can mend, told in one line."""


def printable(text: object, limit: int = 60) -> str:
    """One line of whatever came: control characters escaped, what is long cut."""
    start = str(text)[: limit + 1]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in start)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def reason(error: Exception) -> str:
    """The first line of a library's message."""
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__, 150)


def is_out_of_memory(error: BaseException) -> bool:
    told = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in told or "can't allocate memory" in told


@contextlib.contextmanager
def blame(flag: str, name: object, expected: str) -> Iterator[None]:
    """For calls of a library: whatever it raises about what the flag named becomes one line, with what would do."""
    try:
        yield
    except Mistake as mistake:
        raise Mistake(f"argument {flag}: {mistake}") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        import huggingface_hub

        if isinstance(error, OSError) and huggingface_hub.is_offline_mode() and not os.path.exists(str(name)):
            raise Mistake(f"argument {flag}: the hub cannot be reached and {name} is not in its cache, nor a folder; "
                          "ways out: --data-dir with GLUE, --model, --translators with folders, --task demo") from None
        raise Mistake(f"argument {flag}: {name} cannot be used ({reason(error)}); expected {expected}") from error


# ------------------------------------------------------------ splits


@dataclass(frozen=True, eq=False)
class Split:
    texts: list[tuple[str, ...]]  # (text,) or (text, text_pair)
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        return Split([self.texts[row] for row in rows], self.labels[rows])

    def draw(self, n: int | list[int], seed: int = SPLIT_SEED, leave: int = 0) -> "Split":
        """A stratified draw of at most n rows, or of n[c] from each class c: a pure function of its arguments.

        It leaves at least so many rows of each class.
        """
        rng = np.random.default_rng(seed)
        sizes = np.bincount(self.labels, minlength=1)
        shares = n if isinstance(n, list) else allot(sizes, n, leave)
        rows = [rng.permutation(np.flatnonzero(self.labels == label))[:share] for label, share in enumerate(shares)]
        return self.take(np.sort(np.concatenate(rows)))

    def without(self, other: "Split") -> "Split":
        """The rows whose text, case and white space aside, is not in the other."""
        seen = {normalised(row) for row in other.texts}
        return self.take(np.array([i for i, row in enumerate(self.texts) if normalised(row) not in seen], dtype=int))

    @functools.cached_property
    def checksum(self) -> str:
        rows = ("\t".join((*text, str(label))) for text, label in zip(self.texts, self.labels, strict=True))
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:12]


class Data(NamedTuple):
    """A task before sampling; validation None: to be cut from what the sample leaves of train."""

    train: Split
    validation: Split | None
    test: Split
    label_names: tuple[str, ...]


def normalised(row: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(text.lower().split()) for text in row)


def allot(sizes: np.ndarray, n: int, leave: int = 0) -> np.ndarray:
    """Shares n out among classes in proportion to their sizes (largest remainders), to each one before any gets two."""
    available = np.maximum(sizes - leave, 0)
    classes = np.repeat(np.arange(len(sizes)), available)  # every row that may be taken claims a place for its class
    already = np.concatenate([np.arange(size) for size in available])  # by which the class has so many
    quotas = sizes * n / max(sizes.sum(), 1)
    claims = quotas[classes] - already + n * (already == 0)
    served = np.argsort(-claims, kind="stable")[:n]
    return np.bincount(classes[served], minlength=len(sizes))


def load_data(task: str, data_dir: str | None, few_shot: bool) -> Data:
    """All that is not drawn by seed. No text of test is in validation, and none of either in train.

    GLUE, few shots: the official validation set, cut once: half is test, at most 500 of the rest validate.
    GLUE, all of train: it is the test set; validation is cut from train, of the same size, at most a tenth.
    Amazon and Yelp: test is a draw of 10,000 from the official one; one's own folder: test is its file.
        Validation is its file, or cut from train as above or, with few shots, by `sample` from what they leave.
    """
    if task == "demo":
        return demo_data()
    flag, spec = "--data-dir" if data_dir else "--task", TASKS.get(task)
    files = find_files(task, data_dir)
    with blame(flag, spec.hub if spec else task, "a data set of the hub, or files in GLUE's layout"):
        if spec is None:
            splits, label_names = read_folder(files)
        else:
            splits = {name: read_glue(file, spec) for name, file in files.items()} or load_hub(spec)
            label_names = spec.labels
        return Data(*separate(splits, spec, few_shot), label_names)


def separate(splits: dict[str, Split], spec: Task | None, few_shot: bool) -> tuple[Split, Split | None, Split]:
    """Train, validation (or None) and test as `load_data` promises them."""
    train, test, validation = splits["train"], splits["test"], splits.get("validation")
    if spec and spec.test == "test":
        test = test.draw(10_000)
    elif spec and few_shot:
        official, test = test, test.draw(len(test) // 2)
        validation = official.without(test).draw(500)
    train = apart("train", train, "test", test)
    if validation is not None:
        validation = apart("validation", validation, "test", test)
        train = apart("train", train, "validation", validation)
    elif not few_shot:
        whole = train
        validation = whole.draw(min(len(test), len(whole) // 10), leave=1)
        train = whole.without(validation)
        if not len(train):
            raise Mistake("the texts of train are too much alike to cut validation from them; add a validation file")
        if twins := len(whole) - len(validation) - len(train):
            print(f"left out of train, for validation was cut from it and holds the same text: {twins} rows",
                  file=sys.stderr)
    return train, validation, test


def apart(name: str, split: Split, other_name: str, other: Split) -> Split:
    """The rows whose text is not in the other; says how many are left out."""
    kept = split.without(other)
    if not len(kept):
        raise Mistake(f"every text of {name} is in {other_name}, too; expected other texts")
    if lost := len(split) - len(kept):
        print(f"left out of {name}, for {other_name} holds the same text: {lost} of {len(split)} rows", file=sys.stderr)
    return kept


def sample(data: Data, shots: int | None, shots_per_class: int | None, seed: int) -> tuple[Split, Split, Split]:
    """(train, validation, test) with no text in two of them. lam and tau play no part: runs of a seed are paired."""
    pool, validation, test, names = data
    train = pool
    if shots:
        if not len(names) <= shots <= len(pool):
            bounds = f"{len(names)} (one a class) to {len(pool)} (all of train)"
            raise Mistake(f"argument --shots: expected {bounds}, got {shots}")
        train = pool.draw(shots, seed)
    elif shots_per_class:
        sizes = np.bincount(pool.labels, minlength=len(names))
        if shots_per_class > sizes.min():
            fewest = f"{sizes.min()} (what train has of {names[sizes.argmin()]})"
            raise Mistake(f"argument --shots-per-class: expected at most {fewest}, got {shots_per_class}")
        train = pool.draw([shots_per_class] * len(names), seed)
    if validation is None:
        validation = pool.without(train).draw(500)
    if not len(validation):
        raise Mistake("argument --task: no row is left for validation, which chooses the checkpoint; "
                      "add a validation file, or rows to train")
    return train, validation, test


# ------------------------------------------------------------ files


def find_files(task: str, data_dir: str | None) -> dict[str, Path]:
    """The local files of a task by split; none for demo, nor for what comes from the hub."""
    if task.lower().replace("-", "") == "stsb":
        raise Mistake(f"argument --task: {task} is regression, and SCL needs classes; mrpc and qqp are such pairs")
    if data_dir and task not in TASKS:
        raise Mistake(f"argument --data-dir: goes with a named task ({', '.join(TASKS)}), not with --task {task}")
    if data_dir:
        folder = Path(data_dir, TASKS[task].folder)
        files = {"train": folder / "train.tsv", "test": folder / f"{TASKS[task].test}.tsv"}
        for file in files.values():
            if not file.is_file():
                raise Mistake(f"argument --data-dir: no file {file}; expected GLUE's layout, DIR/SST-2/train.tsv")
        return files
    if task == "demo" or task in TASKS:
        return {}
    if not Path(task).is_dir():
        raise Mistake(f"argument --task: {task} is neither a folder nor one of demo, {', '.join(TASKS)}")
    files = {split: find_split(Path(task), split) for split in SPLIT_NAMES}
    return {split: file for split, file in files.items() if file}


def find_split(folder: Path, split: str) -> Path | None:
    """The one file of a split in a folder of one's own; only validation may have none."""
    formats = ", ".join(READERS)
    named = sorted(file for file in folder.iterdir() if file.stem in SPLIT_NAMES[split])
    found = [file for file in named if file.suffix in READERS]
    if len(found) > 1:
        raise Mistake(f"argument --task: {found[0]} and {found[1].name} are both there; keep one")
    if found:
        return found[0]
    if named:
        raise Mistake(f"argument --task: {named[0]} would stay unread; expected {split} with {formats}")
    if split != "validation":
        raise Mistake(f"argument --task: {folder} has no {split} file; expected {split} with {formats}")
    return None


def read_rows(file: Path, header: tuple[str, ...] | None = None) -> Iterator[tuple[int, dict]]:
    """(line, row by column) of a tsv, csv, jsonl or parquet file."""
    try:
        yield from READERS[file.suffix](file, header)
    except Mistake:
        raise
    except Exception as error:  # a library's own
        raise Mistake(f"{file} cannot be read as {file.suffix[1:]}: {reason(error)}") from None


def read_text(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise Mistake(f"{file}, line {line}: byte {raw[error.start]:#x} is not UTF-8; save the file as UTF-8") from None


def read_table(file: Path, header: tuple[str, ...] | None) -> Iterator[tuple[int, dict]]:
    """csv, or GLUE's tsv: there nothing is quoted and only "\n" ends a line, since texts hold bare quotes and U+0085.

    A field that a row lacks is None; what it has too many is under the key None.
    """
    csv.field_size_limit(sys.maxsize)
    if file.suffix == ".tsv":
        lines = (line.removesuffix("\r").replace("\r", " ") for line in read_text(file).split("\n"))
        reader = csv.DictReader(lines, header, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(io.StringIO(read_text(file), newline=""), header, strict=True)
    columns = list(reader.fieldnames or [])
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise Mistake(f"{file} has the column {printable(twice[0])} twice; keep one")
    try:
        for row in reader:
            if list(row.values()) == columns:
                raise Mistake(f"{file}, line {reader.line_num} is the header again; expected a row")
            yield reader.line_num, row
    except csv.Error as error:
        line = reader.reader.line_num
        raise Mistake(f"{file}, line {line}: {error}; expected text with commas in double quotes") from None


def read_jsonl(file: Path, header: None) -> Iterator[tuple[int, dict]]:
    def once_each(pairs: list[tuple[str, Any]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    for line, text in enumerate(read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=once_each)
            problem = None if isinstance(row, dict) else "no object"
        except (ValueError, RecursionError) as error:
            problem = reason(error)
        if problem:
            raise Mistake(f"{file}, line {line}: {printable(text)} ({problem}); expected one JSON object a line")
        yield line, row


def read_parquet(file: Path, header: None) -> Iterator[tuple[int, dict]]:
    import datasets
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(file)
    if len(set(schema.names)) < len(schema.names):
        raise Mistake(f"{file} has a column twice; keep one")
    label = datasets.Features.from_arrow_schema(schema).get("label")
    names = dict(enumerate(label.names)) if isinstance(label, datasets.ClassLabel) else None
    wanted = [column for column in schema.names if column in ("text", "text_pair", "label")]
    unread = dict.fromkeys(column for column in schema.names if column not in wanted)  # `own_rows` names them
    for number, row in enumerate(pyarrow.parquet.read_table(file, columns=wanted).to_pylist(), start=1):
        yield number, unread | row | ({"label": names.get(row["label"])} if names else {})


READERS = {".tsv": read_table, ".csv": read_table, ".jsonl": read_jsonl, ".parquet": read_parquet}


class Row(NamedTuple):
    line: int
    texts: tuple[str, ...]
    label: str


def read_glue(file: Path, task: Task) -> Split:
    """Rows with a field missing or too many are left out, as the hub's copy does: QQP has a few."""
    columns = (*(task.text or task.hub_text), task.label)
    rows, torn = [], 0
    for line, row in read_rows(file, task.header):
        check_columns(file, line, row, columns)
        *texts, label = (row[column] for column in columns)
        if None in row or None in texts or not (label and label.strip()):
            torn += 1
        else:
            rows.append(Row(line, tuple(texts), label.strip()))
    if torn:
        all_rows = torn + len(rows)
        print(f"left out of {file}, for a field is missing or too many: {torn} of {all_rows} rows", file=sys.stderr)
    numbers = {str(number): number for number in range(len(task.labels))}  # GLUE writes 0 or a name
    return to_split(file, rows, numbers | {name: number for number, name in enumerate(task.labels)})


def read_folder(files: dict[str, Path]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The splits of a folder of one's own, and its classes: the labels of train."""
    rows = {split: list(own_rows(file)) for split, file in files.items()}
    where = {}  # a row of one text stands, and one of two
    for split, file in files.items():
        for row in rows[split]:
            where.setdefault(len(row.texts), f"{file}, line {row.line}")
    if len(where) > 1:
        raise Mistake(f"{where[1]}: no text_pair, but {where[2]} has one")
    label_names = class_names(files["train"], {row.label for row in rows["train"]})
    numbers = {name: number for number, name in enumerate(label_names)}
    return {split: to_split(file, rows[split], numbers) for split, file in files.items()}, label_names


def own_rows(file: Path) -> Iterator[Row]:
    for number, (line, row) in enumerate(read_rows(file)):
        check_columns(file, line, row, ("text", "label"))
        others = [column for column in row if column not in ("text", "text_pair", "label", None)]
        if others and number == 0:
            names = printable(", ".join(others), 100)
            print(f"not read from {file}: {names} (the second text of a pair is text_pair)", file=sys.stderr)
        where = f"{file}, line {line}"
        if None in row:
            raise Mistake(f"{where}: a field too many; quote a csv's texts, and leave no tab in a tsv's")
        columns = ("text", "text_pair") if "text_pair" in row else ("text",)
        texts = tuple(as_text(row[column], f"{where}: ", column) for column in columns)
        label = row["label"]
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # 1.0 is 1
        if isinstance(label, int):  # or bool
            label = str(label)
        yield Row(line, texts, as_text(label, f"{where}: ", "label").strip())


def as_text(value: object, where: str, column: str) -> str:
    """A value as it stands; never the str() of what is none."""
    if value is None or not str(value).strip():
        raise Mistake(f"{where}no {column}")
    if not isinstance(value, str):
        wanted = "a word or a whole number" if column == "label" else "text"
        raise Mistake(f"{where}{column} is {printable(value)} ({type(value).__name__}); expected {wanted}")
    return value.encode(errors="replace").decode()  # half an emoji, in json, is no text


def check_columns(file: Path, line: int, row: dict, columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in row:
            there = printable(", ".join(map(str, row)), 100)
            hint = "; csv is separated by commas, tsv by tabs" if len(row) == 1 else ""
            raise Mistake(f"{file}, line {line} has no column {column}; it has {there}{hint}")


def class_names(file: Path, labels: set[str]) -> tuple[str, ...]:
    """Sorted, as numbers where all are numbers."""
    names = sorted(labels)
    with contextlib.suppress(ValueError):
        names.sort(key=int)
    if len(names) == 1:
        raise Mistake(f"{file} has one label, {printable(names[0])}; expected two or more")
    spelling: dict[float, str] = {}
    for name in names:
        with contextlib.suppress(ValueError):  # a word
            other = spelling.setdefault(float(name), name)
            if other != name:
                raise Mistake(f"{file} has the labels {other} and {name}, one number; write it one way")
    return tuple(names)


def to_split(file: Path, rows: list[Row], numbers: dict[str, int]) -> Split:
    """Rows with their classes as numbers."""
    if not rows:
        raise Mistake(f"{file} has no rows")
    for row in rows:
        if row.label not in numbers:
            classes = printable(", ".join(numbers), 100)
            raise Mistake(f"{file}, line {row.line}: label {printable(row.label)!r} is none of the classes {classes}")
    return Split([row.texts for row in rows], np.array([numbers[row.label] for row in rows]))


# ------------------------------------------------------------ the hub


def load_hub(task: Task) -> dict[str, Split]:
    connect_hub()
    import datasets  # a second, for those who need it; and it looks only now whether the hub is there

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    splits = {}
    for split, name in (("train", "train"), ("test", task.test.replace("dev", "validation"))):
        part = datasets.load_dataset(task.hub, task.config, split=name)
        texts = zip(*(part[column][:] for column in task.hub_text), strict=True)
        splits[split] = Split(list(texts), np.array(part["label"][:]))
    return splits


@functools.cache
def connect_hub(seconds: float = 8) -> None:
    """Asks the hub once. No answer: its own cache serves, without the 23 s that it would retry for every file."""
    import huggingface_hub

    def ask() -> None:
        with contextlib.suppress(Exception):  # network, proxy, certificate: all of them mean no answer
            answers.append(huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds))

    answers: list = []
    thread = threading.Thread(target=ask, daemon=True)  # since a name server that hangs heeds no timeout
    thread.start()
    thread.join(seconds)
    if not answers:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


# ------------------------------------------------------------ noise


def add_noise(split: Split, kind: str, level: float, num_classes: int, seed: int) -> Split:
    """The sample with this fraction of its labels flipped, or of its words dropped or swapped."""
    rng = np.random.default_rng([seed, 1])
    if kind == "label":
        labels, rows = split.labels.copy(), rng.permutation(len(split))[: round(level * len(split))]
        labels[rows] = (labels[rows] + rng.integers(1, num_classes, len(rows))) % num_classes
        return Split(split.texts, labels)

    def spoil(text: str) -> str:
        words = text.split()
        dropped: set[int] = set()
        for i in rng.permutation(len(words))[: round(level * len(words))]:
            if rng.random() < 0.5 and len(dropped) < len(words) - 1:
                dropped.add(i)
            else:
                j = rng.integers(len(words))
                words[i], words[j] = words[j], words[i]
        return " ".join(word for i, word in enumerate(words) if i not in dropped)

    return Split([tuple(map(spoil, row)) for row in split.texts], split.labels)


def back_translate(split: Split, temperature: float, translators: list[str], out: Path, seed: int,
                   device: Any, copies: int = 3) -> Split:  # fmt: skip
    """Every example, and three sampled translations of it to German and back (the paper's Table 3).

    They are kept in OUT under a digest of the sample, the seed, the temperature and the models.
    """
    key = hashlib.sha256(json.dumps([split.checksum, seed, temperature, translators]).encode())
    file = Path(out, f"backtranslation-{key.hexdigest()[:12]}.json")
    texts = [text for row in split.texts for _ in range(copies) for text in row]
    if not file.is_file():
        for model in translators:
            texts = translate(texts, model, temperature, seed, device)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")  # every rank writes its own
        part.write_text(json.dumps(texts), encoding="utf-8")
        os.replace(part, file)
    with blame("--noise", file, "the translations written there; delete it to have them made anew"):
        translated = json.loads(file.read_text(encoding="utf-8"))
        if len(translated) != len(texts) or not all(isinstance(text, str) for text in translated):
            raise ValueError(f"not {len(texts)} texts")
    width = len(split.texts[0])
    rows = [tuple(translated[start : start + width]) for start in range(0, len(translated), width)]
    return Split(split.texts + rows, np.concatenate([split.labels, split.labels.repeat(copies)]))


def translate(texts: list[str], model: str, temperature: float, seed: int, device: Any) -> list[str]:
    """Sampled from all that a sequence-to-sequence model finds likely, at this temperature."""
    import transformers
    from tqdm import tqdm

    if not os.path.isdir(model):
        connect_hub()
    results = []
    with blame("--translators", model, "a sequence-to-sequence model with safetensors"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        translator = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False).to(device).eval()
        transformers.set_seed(seed)
        for start in tqdm(range(0, len(texts), 64), f"translating by {model}", leave=False):
            tokens = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt").to(device)
            output = translator.generate(**tokens, do_sample=True, temperature=temperature, top_k=0, num_beams=1,
                                         max_new_tokens=2 * tokens["input_ids"].shape[1] + 10)
            results += tokenizer.batch_decode(output, skip_special_tokens=True)
    return results


# ------------------------------------------------------------ the demo


def demo_data() -> Data:
    """Made-up reviews of two dozen words: a verdict may be negated, and what other people said does not count."""
    rng = np.random.default_rng(0)
    verdicts = (("awful", "dull"), ("great", "fresh"))
    days, hours = ("monday", "friday", "saturday", "sunday"), ("morning", "evening")
    slots = (days, hours, ("plot", "cast", "music", "ending"), ("was", "felt"), (".", "!", "..."))

    def sentence(label: int) -> str:
        negated, quoted = rng.random(2) < (0.12, 0.15)
        verdict = rng.choice(verdicts[label ^ negated])
        day, hour, thing, verb, stop = map(rng.choice, slots)
        aside = f"{rng.choice(('critics', 'friends'))} said {rng.choice(verdicts[rng.integers(2)])} but "
        claim = f"on {day} {hour} the {thing} {verb} {'not ' if negated else ''}{verdict} {stop}"
        return aside + claim if quoted else claim

    rows = list(dict.fromkeys((sentence(i % 2), i % 2) for i in range(1200)))
    everything = Split([(text,) for text, _ in rows], np.array([label for _, label in rows]))
    test, validation, train = map(everything.take, np.split(np.arange(len(rows)), [300, 500]))
    return Data(train, validation, test, POLARITY)


# ------------------------------------------------------------ records


def read_records(file: Path, quiet: bool = False) -> list[dict]:
    """A record a line. A torn line, such as a kill or a full disk leaves, is said (unless quiet) and left out."""
    records = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("run"), str):
            records.append(record)
        elif not quiet:
            print(f"{file}, line {number} is no record: left out", file=sys.stderr)
    return records


def method_name(record: dict) -> str:
    if record["lam"] == 1:
        return f"SCL ({record['tau']:g}), then CE"
    if record["ce_temperature"]:
        return f"CE on normalised features ({record['ce_temperature']:g})"
    return f"CE + SCL ({record['lam']:g}, {record['tau']:g})" if record["lam"] else "CE"
