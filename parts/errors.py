"""Defines user errors, which are problems that the user can correct, and helpers that print text on one line."""

import contextlib
import functools
import os
import sys
import threading
import unicodedata
from collections.abc import Iterator


class UserError(Exception):
    """Reports a problem that the user can correct. The message names the flag, the value found and what to do."""


def one_line(text: object, limit: int | None = None) -> str:
    """Returns the text as one line. Escapes control characters and shortens the text to `limit` characters."""
    line = "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in str(text))
    return line if limit is None or len(line) <= limit else f"{line[: limit - 3]}..."


def prepare_stdout() -> None:
    """Prints each line at once, and escapes letters that the terminal cannot show."""
    if sys.stdout is None:  # the parent process closed stdout
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream cannot be reconfigured
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


def first_line(error: Exception) -> str:
    """Returns the first line of an error message of a library."""
    message = str(error).strip() or type(error).__name__
    return one_line(message.splitlines()[0], 150)


def is_out_of_memory(error: BaseException) -> bool:
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


@contextlib.contextmanager
def explain_errors(flag: str, value: object, expected: str, without_hub: str | None = None) -> Iterator[None]:
    """Turns an exception inside the block into a UserError that names the flag, the value and the expected value.

    The text `without_hub` tells the user what to do if the hub cannot be reached.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"argument {flag}: {error}") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if without_hub and isinstance(error, OSError):
            import huggingface_hub

            if huggingface_hub.is_offline_mode():
                raise UserError(f"argument {flag}: the hub cannot be reached, and its cache does not hold {value}; "
                                f"{without_hub}") from None
        problem = f"{value} cannot be used ({first_line(error)})"
        raise UserError(f"argument {flag}: {problem}; expected {expected}") from error


@functools.cache
def connect_hub(seconds: float = 8) -> None:
    """Checks whether the hub answers. If the hub does not answer, transformers and datasets use only cached files.

    Without this check, transformers and datasets try to reach the hub for 23 s per file.
    """
    import huggingface_hub

    def ask() -> None:
        with contextlib.suppress(Exception):  # network, proxy and certificate errors count as no answer
            answers.append(huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds))

    answers: list = []
    thread = threading.Thread(target=ask, daemon=True)  # a thread, because the DNS lookup ignores `timeout`
    thread.start()
    thread.join(seconds)
    if not answers:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
