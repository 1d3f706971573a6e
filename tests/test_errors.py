"""parts/errors.py: messages in one line, and a hub that cannot be reached."""

import threading

import datasets
import huggingface_hub
import pytest

from conftest import user_error
from parts.errors import UserError, connect_hub, explain_errors, first_line, one_line


def test_one_line_escapes_control_characters_only():
    assert one_line("sch\u00f6n \u732b \U0001f600") == "sch\u00f6n \u732b \U0001f600"
    assert one_line("a\nb\x1b[31m\u2028\ud83d") == "a\\nb\\x1b[31m\\u2028\\ud83d"
    assert one_line("x" * 100) == "x" * 100
    assert one_line("x" * 100, 60) == "x" * 57 + "..."


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n what\nand more")) == "what"
    assert first_line(KeyError()) == "KeyError"


def test_an_error_of_a_library_names_flag_value_and_expectation():
    with (pytest.raises(UserError, match=r"^argument --model: x cannot be used \(no\); expected a folder$"),
          explain_errors("--model", "x", "a folder")):
        raise ValueError("no\nmore")
    with pytest.raises(UserError, match=r"^argument --model: mine$"), explain_errors("--model", "x", "a folder"):
        raise UserError("mine")
    with pytest.raises(MemoryError), explain_errors("--model", "x", "a folder"):
        raise MemoryError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Forgets whether the hub answers, and takes away the caches. The test replaces `get_session`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    connect_hub.cache_clear()
    yield
    connect_hub.cache_clear()


@pytest.mark.parametrize("flags, message", [
    ("--task sst2", "argument --task: the hub cannot be reached, and its cache does not hold nyu-mll/glue; give "
                    "--data-dir with the files in GLUE's layout"),
    ("--task demo --model nobody/nothing", "argument --model: the hub cannot be reached, and its cache does not hold "
                                           "nobody/nothing; give --model a local folder"),
    ("--task demo --shots 4 --noise backtranslation --noise-level 1 --translators nobody/nothing nobody/nothing",
     "argument --translators: the hub cannot be reached, and its cache does not hold nobody/nothing; give two local "
     "folders with such models")])
def test_without_the_hub_the_message_names_the_local_alternative(capsys, tmp_path, monkeypatch, hub, flags, message):
    def unreachable():
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    assert user_error(capsys, tmp_path, *flags.split()).removeprefix("finetune.py: error: ") == message


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch, hub):
    """For example a name server that hangs. No timeout of a library ends the wait."""
    class Silent:
        def head(self, *_, **__):
            threading.Event().wait()

    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    connect_hub(0.1)
    assert huggingface_hub.constants.HF_HUB_OFFLINE
