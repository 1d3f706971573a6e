"""Handles the examples of a task: training, validation and test set, k-shot samples, noise, and the demo data.

    train, validation, test = sample(data, shots=20, shots_per_class=None, seed=0)
"""

import functools
import hashlib
import json
import os
import sys
import unicodedata
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parts.errors import UserError, connect_hub, explain_errors

SPLIT_SEED = 0  # random seed for dividing the official files into validation and test set


@dataclass(frozen=True, eq=False)
class Split:
    """Holds the texts and labels of a training, validation or test set."""

    texts: list[tuple[str, ...]]  # (text,) or (text, text_pair)
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def class_sizes(self, num_classes: int) -> np.ndarray:
        return np.bincount(self.labels, minlength=num_classes)

    def take(self, indices: np.ndarray) -> "Split":
        return Split([self.texts[i] for i in indices], self.labels[indices])

    def draw(self, n: int | list[int], seed: int = SPLIT_SEED, leave: int = 0) -> "Split":
        """Draws at most n examples, stratified by class, or n[c] examples of each class c if n is a list.

        After a stratified draw, at least `leave` examples of each class remain.
        """
        rng = np.random.default_rng(seed)
        sizes = self.class_sizes(1)
        shares = n if isinstance(n, list) else allot(sizes, n, leave)
        drawn = [rng.permutation(np.flatnonzero(self.labels == label))[:share] for label, share in enumerate(shares)]
        return self.take(np.sort(np.concatenate(drawn)))

    def without(self, other: "Split") -> "Split":
        """Returns the examples of this split whose normalised texts are not in the other split."""
        seen = {normalise(texts) for texts in other.texts}
        kept = [i for i, texts in enumerate(self.texts) if normalise(texts) not in seen]
        return self.take(np.array(kept, dtype=int))

    @functools.cached_property
    def checksum(self) -> str:
        lines = ("\t".join((*texts, str(label))) for texts, label in zip(self.texts, self.labels, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


class Data(NamedTuple):
    """Holds the data of a task before a k-shot sample is drawn.

    If `validation` is None, `sample` draws the validation set from the training examples outside the k-shot sample.
    """

    train: Split
    validation: Split | None
    test: Split
    label_names: tuple[str, ...]


def normalise(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the texts in Unicode form NFKC, in lower case (casefold) and with single spaces."""
    return tuple(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)


def allot(sizes: np.ndarray, n: int, leave: int = 0) -> np.ndarray:
    """Divides n examples among classes in proportion to class size, by the largest remainder method.

    Each class gets one example before any class gets two.
    """
    available = np.maximum(sizes - leave, 0)
    classes = np.repeat(np.arange(len(sizes)), available)  # class of each example that may be drawn
    earlier = np.concatenate([np.arange(size) for size in available])  # number of examples of the same class before it
    quotas = sizes * n / max(sizes.sum(), 1)
    priority = quotas[classes] - earlier + n * (earlier == 0)
    drawn = np.argsort(-priority, kind="stable")[:n]
    return np.bincount(classes[drawn], minlength=len(sizes))


def separate(train: Split, validation: Split | None, test: Split, few_shot: bool) -> tuple[Split, Split | None, Split]:
    """Removes examples so that training, validation and test set have no text in common.

    If `few_shot` is false and there is no validation set, draws a validation set from the training examples. The
    validation set is as large as the test set or a tenth of the training set, whichever is smaller.
    """
    train = remove_texts("train", train, "test", test)
    if validation is not None:
        validation = remove_texts("validation", validation, "test", test)
        train = remove_texts("train", train, "validation", validation)
    elif not few_shot:
        whole = train
        validation = whole.draw(min(len(test), len(whole) // 10), leave=1)
        train = whole.without(validation)
        if not len(train):
            raise UserError("no example of train is left, because its texts are too similar; add a validation file")
        if duplicates := len(whole) - len(validation) - len(train):
            print(f"removed from train: {duplicates} examples, because the validation set has the same texts",
                  file=sys.stderr)
    return train, validation, test


def remove_texts(name: str, split: Split, other_name: str, other: Split) -> Split:
    """Returns the examples of `split` whose texts are not in `other`. Prints the number of removed examples."""
    kept = split.without(other)
    if not len(kept):
        raise UserError(f"every text of {name} is also in {other_name}; give {name} other texts")
    if removed := len(split) - len(kept):
        print(f"removed from {name}: {removed} of {len(split)} examples, because their texts are in {other_name}",
              file=sys.stderr)
    return kept


def sample(data: Data, shots: int | None, shots_per_class: int | None, seed: int) -> tuple[Split, Split, Split]:
    """Returns the training, validation and test set. The training set depends only on the data, shots and seed."""
    pool, validation, test, names = data
    train = pool
    if shots:
        if not len(names) <= shots <= len(pool):
            expected = f"{len(names)} (one for each class) to {len(pool)} (all of train)"
            raise UserError(f"argument --shots: expected {expected}, got {shots}")
        train = pool.draw(shots, seed)
    elif shots_per_class:
        sizes = pool.class_sizes(len(names))
        if shots_per_class > sizes.min():
            smallest = f"{sizes.min()} (the examples of class {names[sizes.argmin()]} in train)"
            raise UserError(f"argument --shots-per-class: expected at most {smallest}, got {shots_per_class}")
        train = pool.draw([shots_per_class] * len(names), seed)
    if validation is None:
        validation = pool.without(train).draw(500)
    if not len(validation):
        raise UserError("argument --task: no example is left for the validation set, which chooses the checkpoint; "
                        "add a validation file or examples to train")
    return train, validation, test


def draw_splits(args: Namespace, data: Data, seed: int, device: Any) -> tuple[Split, Split, Split]:
    """Returns the data of a seed: training set (a k-shot sample, perhaps with noise), validation set and test set."""
    train, validation, test = sample(data, args.shots, args.shots_per_class, seed)
    if args.noise == "backtranslation":
        train = back_translate(train, args.noise_level, args.translators, Path(args.out), seed, device, args.dry_run)
    elif args.noise in ("label", "word"):
        train = add_noise(train, args.noise, args.noise_level, len(data.label_names), seed)
    return train, validation, test


# ------------------------------------------------------------ noise


def add_noise(split: Split, kind: str, level: float, num_classes: int, seed: int) -> Split:
    """Adds noise: changes a fraction `level` of the labels, or drops or swaps a fraction `level` of the words.

    Prints a message if the noise changes no label and no word.
    """
    rng = np.random.default_rng([seed, 1])
    if kind == "label":
        labels, chosen = split.labels.copy(), rng.permutation(len(split))[: round(level * len(split))]
        labels[chosen] = (labels[chosen] + rng.integers(1, num_classes, len(chosen))) % num_classes
        noisy = Split(split.texts, labels)
    else:
        texts = [tuple(drop_or_swap_words(text, level, rng) for text in texts) for texts in split.texts]
        noisy = Split(texts, split.labels)

    words, noisy_words = ([[text.split() for text in texts] for texts in part.texts] for part in (split, noisy))
    if words == noisy_words and (noisy.labels == split.labels).all():
        print(f"argument --noise-level: {level:g} changes none of the {len(split)} examples", file=sys.stderr)
    return noisy


def drop_or_swap_words(text: str, level: float, rng: np.random.Generator) -> str:
    words = text.split()
    dropped: set[int] = set()
    for i in rng.permutation(len(words))[: round(level * len(words))]:
        if rng.random() < 0.5 and len(dropped) < len(words) - 1:
            dropped.add(i)
        else:
            j = rng.integers(len(words))
            words[i], words[j] = words[j], words[i]
    return " ".join(word for i, word in enumerate(words) if i not in dropped)


def back_translate(split: Split, temperature: float, translators: list[str], out: Path, seed: int,
                   device: Any, dry_run: bool = False, copies: int = 3) -> Split:
    """Adds three sampled back-translations (English to German to English) of each example, as in the paper's Table 3.

    Stores the translations in a file in the folder `out`. A digest of the examples, seed, temperature and models is
    part of the file's name. A dry run does not translate: it returns copies of the examples as their translations.
    """
    if dry_run:
        print("note: a dry run does not translate; copies of the examples replace the translations", file=sys.stderr)
        return Split(split.texts * (1 + copies), np.tile(split.labels, 1 + copies))
    key = hashlib.sha256(json.dumps([split.checksum, seed, temperature, translators]).encode())
    file = Path(out, f"backtranslation-{key.hexdigest()[:12]}.json")
    texts = [text for row in split.texts for _ in range(copies) for text in row]
    if not file.is_file():
        for model in translators:
            texts = translate(texts, model, temperature, seed, device)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")  # each rank has its own temporary file
        part.write_text(json.dumps(texts), encoding="utf-8")
        os.replace(part, file)
    with explain_errors("--noise", file, "the translations of an earlier run; delete the file to translate again"):
        translated = json.loads(file.read_text(encoding="utf-8"))
        if len(translated) != len(texts) or not all(isinstance(text, str) for text in translated):
            raise ValueError(f"not {len(texts)} texts")
    width = len(split.texts[0])
    rows = [tuple(translated[start : start + width]) for start in range(0, len(translated), width)]
    return Split(split.texts + rows, np.concatenate([split.labels, split.labels.repeat(copies)]))


def translate(texts: list[str], model: str, temperature: float, seed: int, device: Any) -> list[str]:
    """Samples one translation of each text from a sequence-to-sequence model with the given temperature."""
    import transformers
    from tqdm import tqdm

    if not os.path.isdir(model):
        connect_hub()
    results = []
    expected = "a sequence-to-sequence model with safetensors"
    with explain_errors("--translators", model, expected, without_hub="give two local folders with such models"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        translator = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False).to(device).eval()
        transformers.set_seed(seed)
        for start in tqdm(range(0, len(texts), 64), f"translating with {model}", leave=False):
            tokens = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt").to(device)
            output = translator.generate(**tokens, do_sample=True, temperature=temperature, top_k=0, num_beams=1,
                                         max_new_tokens=2 * tokens["input_ids"].shape[1] + 10)
            results += tokenizer.batch_decode(output, skip_special_tokens=True)
    return results


# ------------------------------------------------------------ the demo


def demo_data() -> Data:
    """Generates short reviews from two dozen words. The label of a review is the opinion of its author.

    Some reviews negate the verdict ("not great" is negative). Some reviews also quote the opinion of other people,
    which does not change the label.
    """
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
    return Data(train, validation, test, ("negative", "positive"))
