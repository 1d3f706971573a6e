"""Tests of splits, k-shot samples, noise and the demo."""

import json

import numpy as np
import pytest

from conftest import sentences
from parts import data
from parts.data import Data, Split, add_noise, allot, demo_data, sample, separate
from parts.errors import UserError


def texts(split):
    return {" ".join(row).lower() for row in split.texts}


def split_of(*rows):
    """A split of sentences with alternating labels."""
    return Split([(text,) for text in rows], np.arange(len(rows)) % 2)


# ------------------------------------------------------------ splits


def test_checksum_depends_on_texts_labels_and_order():
    split = Split([("a",), ("b",)], np.array([0, 1]))
    others = [Split([("a",), ("c",)], np.array([0, 1])), Split([("a",), ("b",)], np.array([1, 1])), split.take([1, 0])]
    assert len({split.checksum, *(other.checksum for other in others)}) == 4


@pytest.mark.parametrize("sizes, n, expected", [
    ([50, 50], 20, [10, 10]), ([90, 10], 20, [18, 2]), ([98, 1, 1], 3, [1, 1, 1]), ([98, 1, 1], 10, [8, 1, 1]),
    ([0, 30, 10], 4, [0, 3, 1]), ([5, 5], 10, [5, 5]), ([3, 3, 3], 2, [1, 1, 0]),
])
def test_allot(sizes, n, expected):
    assert allot(np.array(sizes), n).tolist() == expected


def test_allot_gives_places_by_largest_remainders():
    """Compares with the definition, which gives one place at a time, on random sizes."""
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


@pytest.mark.parametrize("text, other", [
    ("Straße  4", "STRASSE 4"), ("caf\u00e9", "cafe\u0301"), ("\uff46\uff55\uff4c\uff4c", "full"), 
    ("a\u00a0b\t", " A b"), ("\ufb01ne", "FINE"),
])
def test_texts_are_equal_after_normalisation(text, other):
    assert not len(split_of(text).without(split_of("so", other)))
    assert len(split_of(text + "x").without(split_of("so", other))) == 1


def test_no_text_is_in_two_splits(capsys):
    train, validation, test = (list(sentences(40, start)) for start in (0, 100, 200))
    loud = [text.upper().replace(" ", "  ") for text in (*validation[:3], *test[:2])]
    separated = separate(split_of(*train, *loud), split_of(*validation, test[5].title()), split_of(*test), True)
    assert [split.texts for split in separated] == [[(text,) for text in split] for split in (train, validation, test)]
    assert capsys.readouterr().err.splitlines() == [
        "removed from train: 2 of 45 examples, because their texts are in test",
        "removed from validation: 1 of 41 examples, because their texts are in test",
        "removed from train: 3 of 43 examples, because their texts are in validation",
    ]


def test_validation_from_train_is_as_large_as_test_and_at_most_a_tenth(capsys):
    train = split_of(*sentences(100))
    for size, expected in ((4, 4), (40, 10)):
        left, validation, _ = separate(train, None, split_of(*sentences(size, 500)), False)
        assert (len(left), len(validation)) == (100 - expected, expected)
        assert len(texts(left) | texts(validation)) == 100
    assert separate(train, None, split_of(*sentences(4, 500)), True)[1] is None
    assert capsys.readouterr() == ("", "")


def test_examples_that_share_a_text_with_the_new_validation_set_are_counted(capsys):
    rows = [text.swapcase() if i else text for text in sentences(40) for i in range(2)]
    train, validation, _ = separate(split_of(*rows), None, split_of(*"abcdefgh"), False)
    removed = len(rows) - len(train) - len(validation)
    assert removed > 0 and not texts(train) & texts(validation)
    assert capsys.readouterr().err.startswith(f"removed from train: {removed} examples")


def test_validation_never_takes_the_only_example_of_a_class():
    common = list(sentences(60))
    for i in range(5):
        rows = [(text,) for text in (*common, "one of its kind", f"another kind {i}")]
        train = Split(rows, np.array([0] * 60 + [1, 2]))
        left, validation, _ = separate(train, None, split_of(*sentences(30, 900)), False)
        assert np.bincount(left.labels, minlength=3)[1:].tolist() == [1, 1] and set(validation.labels) == {0}


def test_an_empty_split_is_an_error_with_its_reason():
    one, other = split_of(*sentences(40)), split_of(*sentences(4, 900))
    for splits, message in (((one, None, one), "every text of train is also in test; give train other texts"),
                            ((one, one, other), "every text of train is also in validation"),
                            ((one, other, other), "every text of validation is also in test"),
                            ((split_of(*["The  same"] * 40), None, other), "add a validation file")):
        with pytest.raises(UserError, match=message):
            separate(*splits, False)


# ------------------------------------------------------------ samples


@pytest.fixture
def pool():
    """A task with 60 examples for training and none for validation."""
    return Data(split_of(*sentences(60)), None, split_of(*sentences(20, 900)), ("a", "b"))


def test_a_sample_is_stratified_and_disjoint(pool):
    train, validation, test = sample(pool, 20, None, 0)
    assert np.bincount(train.labels).tolist() == [10, 10] and len(validation) == 40 and test is pool.test
    assert not texts(train) & texts(validation)


def test_a_sample_is_a_pure_function_of_its_seed(pool):
    alone = sample(pool, 20, None, 3)[0]
    for seed in (5, 3, 0):  # earlier samples do not matter
        np.random.seed(seed)
        later = sample(pool, 20, None, seed)[0]
        assert (later.checksum == alone.checksum) == (seed == 3)


def test_shots_in_total_and_for_each_class():
    three = Data(Split([(text,) for text in sentences(60)], np.arange(60) % 3), None, split_of("so"), ("a", "b", "c"))
    assert np.bincount(sample(three, 20, None, 0)[0].labels).tolist() == [7, 7, 6]
    assert np.bincount(sample(three, None, 4, 0)[0].labels).tolist() == [4, 4, 4]


def test_at_most_500_examples_validate():
    large = Data(split_of(*sentences(700)), None, split_of("so"), ("a", "b"))
    assert len(sample(large, 20, None, 0)[1]) == 500


@pytest.mark.parametrize("shots, per_class, message", [
    (1, None, r"argument --shots: expected 2 \(one for each class\) to 60 \(all of train\), got 1"),
    (61, None, r"argument --shots: expected 2 .* got 61"),
    (None, 31, r"argument --shots-per-class: expected at most 30 \(the examples of class a in train\), got 31"),
    (60, None, "argument --task: no example is left for the validation set"),
])
def test_a_sample_that_train_cannot_give(pool, shots, per_class, message):
    with pytest.raises(UserError, match=message):
        sample(pool, shots, per_class, 0)


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
def test_word_noise_drops_and_moves_words(level):
    split = Split([(" ".join(f"w{i}" for i in range(20)), "one") for _ in range(50)], np.zeros(50, dtype=int))
    noisy = add_noise(split, "word", level, 2, seed=0)
    assert (noisy.labels == split.labels).all()
    kept = [text.split() for text, _ in noisy.texts]
    assert all(set(words) <= set(split.texts[0][0].split()) and len(words) == len(set(words)) for words in kept)
    dropped = 20 - np.mean([len(words) for words in kept])
    assert dropped == pytest.approx(20 * level / 2, abs=1.5)
    assert all(pair == "one" for _, pair in noisy.texts)  # the last word of a text is never dropped
    moved = [words != sorted(words, key=lambda word: int(word[1:])) for words in kept]
    assert any(moved) == (level > 0)


def test_noise_is_a_pure_function_of_its_seed():
    split = demo_data().train
    checksums = [add_noise(split, kind, 0.3, 2, seed).checksum for kind in ("label", "word") for seed in (0, 1, 0)]
    assert checksums[0] == checksums[2] != checksums[1] and checksums[3] == checksums[5] != checksums[4]


@pytest.mark.parametrize("kind, level, changes", [
    ("label", 0.02, False), ("label", 0.05, True), ("word", 0.09, False), ("word", 0.5, True),
])
def test_noise_that_changes_nothing_is_printed(capsys, kind, level, changes):
    """Texts of five words; white space is no change."""
    split = split_of(*(f"w{i} b  c d\te " for i in range(20)))
    add_noise(split, kind, level, 2, seed=0)
    line = f"argument --noise-level: {level} changes none of the 20 examples\n"
    assert capsys.readouterr().err == ("" if changes else line)


def test_back_translation_translates_both_texts_of_a_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "translate", lambda texts, model, *_: [f"{model} {text}" for text in texts])
    split = Split([("a", "b"), ("c", "d")], np.array([1, 0]))
    for _ in range(2):
        noisy = data.back_translate(split, 0.7, ["en", "de"], tmp_path, 0, None)
        assert noisy.texts == [*split.texts, *[("de en a", "de en b")] * 3, *[("de en c", "de en d")] * 3]
        assert noisy.labels.tolist() == [1, 0, 1, 1, 1, 0, 0, 0]
        monkeypatch.setattr(data, "translate", None)  # the second time it reads the file


def test_a_dry_run_counts_the_translations_and_translates_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "translate", None)
    noisy = data.back_translate(split_of("a", "b"), 0.7, ["en", "de"], tmp_path / "out", 0, None, dry_run=True)
    assert len(noisy) == 8 and np.bincount(noisy.labels).tolist() == [4, 4] and not (tmp_path / "out").exists()
    assert "a dry run does not translate" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "[1, 2]", '{"a": 1}', "null", '["only one"]', "[1, 2, 3]"])
def test_a_broken_file_of_translations(tmp_path, monkeypatch, content):
    monkeypatch.setattr(data, "translate", lambda texts, *_: texts)
    arguments = (split_of("a"), 0.7, ["en", "de"], tmp_path, 0, None)
    data.back_translate(*arguments)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == ["a", "a", "a"]
    file.write_text(content)
    with pytest.raises(UserError, match=rf"argument --noise: {file} cannot be used .*delete the file"):
        data.back_translate(*arguments)


def test_translators_without_the_hub_name_a_local_alternative(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(data, "connect_hub", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError) as raised:
        data.translate(["a"], "nobody/nothing", 0.7, 0, "cpu")
    assert "argument --translators: the hub cannot be reached" in str(raised.value)
    assert "nobody/nothing" in str(raised.value) and "give two local folders" in str(raised.value)


# ------------------------------------------------------------ the demo


def test_the_demo_is_disjoint_and_never_changes():
    demo = demo_data()
    assert [len(split) for split in demo[:3]] == [340, 200, 300] and demo.label_names == ("negative", "positive")
    assert len({text for split in demo[:3] for text in split.texts}) == 840
    assert [split.checksum for split in demo[:3]] == ["2df56478a742", "dd0005446e70", "98ff16c013f9"]
