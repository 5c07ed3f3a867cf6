"""What a user is told in place of a traceback. Each outcome is a type with a code, so that callers never
search sentences.

A run that failed leaves its code and its message in its folder as failed.json, from which `from_code` makes
the same type again in another process.
"""

from __future__ import annotations

import re
from typing import Any

NO_ROWS = "no_rows"  # code of a run whose stages leave nothing to train on
MAX_MESSAGE = 3000  # characters
ENDLESS = re.compile(r"\S{300,}")  # a word that nobody reads
# as Python, torch, its CUDA and CPU allocators, oneDNN, safetensors and C++ write it
NO_MEMORY = re.compile(
    r"out of memory|can(?:'|no)t allocate memory|unable to allocate|bad_alloc|os error 12\b"
    r"|could not create a (?:memory object|memory|primitive)",
    re.IGNORECASE,
)
NO_THREADS = re.compile(r"can't start new thread|resource temporarily unavailable", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def quoted(value: Any, length: int = 60) -> str:
    """A value as Python writes it, on one line, of `length` characters at most."""
    try:
        return shortened(repr(value), length)
    except Exception:  # a number of thousands of digits, or what contains itself
        return type(value).__name__


def shortened(value: Any, length: int = 60) -> str:
    """A text, or another value as Python writes it, on one line, of `length` characters at most."""
    if not isinstance(value, str):
        return quoted(value, length)
    text = value[: length + 1].encode("utf-8", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else " " for character in text)
    if len(text) > length:
        return f"{text[:length]}..."
    return text


def readable(message: str) -> str:
    """A message whose values are cut where they are endless, and without what would control a terminal."""
    message = ENDLESS.sub(lambda match: f"{match[0][:100]}...", str(message))
    message = CONTROL.sub(lambda match: repr(match[0])[1:-1], message)
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}..."
    return message.encode("utf-8", "backslashreplace").decode()


class RecipeError(ValueError):
    """A recipe that cannot work. The message says where, what was meant, and what to do (exit code 2).

    code: which outcome it is, in one word; a type of its own has a code of its own.
    """

    code = "recipe"

    def __init__(self, message: str = "", code: str | None = None):
        super().__init__(readable(message))
        if code is not None:
            self.code = code


class PluginWarning(UserWarning):
    """A method that another package announces cannot be used. The message is one line."""


class Refused(RecipeError):
    """A run that would have looked like a success without being one."""

    code = "refused"


class NotFinite(Refused):
    """The loss is no longer a number: the run has diverged."""

    code = "not_finite"


class Diverged(Refused):
    """The loss has risen far above where it began, and the recipe says to stop then."""

    code = "diverged"


class OutOfMemory(Refused):
    """Memory ran out, and nothing smaller could be tried."""

    code = "out_of_memory"


class NothingMoves(Refused):
    """The tuner leaves no parameter to be trained."""

    code = "nothing_moves"


class DiskError(RecipeError):
    """The disk is full or may not be written. What was there before is intact."""

    code = "disk"


class Damaged(RecipeError):
    """A file of a run is missing, or does not hold what was written to it."""

    code = "damaged"


class TooManyThreads(Refused):
    """The system gives no further thread or process."""

    code = "threads"


def out_of_memory(error: BaseException) -> bool:
    """Is this a way to say that memory has run out?"""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def out_of_threads(error: BaseException) -> bool:
    """Is this a way to say that there are no more threads or processes?"""
    return isinstance(error, (RuntimeError, OSError)) and bool(NO_THREADS.search(str(error)))


TOO_BIG = (
    "out of memory; everything saved so far is intact. Lower per_device_train_batch_size"
    " (raise gradient_accumulation_steps for the same result) or max_length, set"
    " gradient_checkpointing: true, or use a tuner with fewer trainable parameters"
)
THREADS = (
    "the system gives no further thread or process; everything saved so far is intact. Raise the limit"
    " (ulimit -u, or that of the container), or set OMP_NUM_THREADS to a smaller number"
)


def outcome_of(error: Exception) -> Exception:
    """An error as the outcome that it is: memory or threads that ran out are a sentence, and any other is
    itself.
    """
    if isinstance(error, RecipeError):
        return error
    if out_of_memory(error):
        return OutOfMemory(TOO_BIG)
    return TooManyThreads(THREADS) if out_of_threads(error) else error


TYPES: dict[str, type[RecipeError]] = {
    kind.code: kind
    for kind in (
        RecipeError,
        Refused,
        NotFinite,
        Diverged,
        OutOfMemory,
        TooManyThreads,
        NothingMoves,
        DiskError,
        Damaged,
    )
}


def from_code(code: str, message: str) -> RecipeError:
    """The outcome that another process wrote down. A code without a type of its own makes a RecipeError."""
    kind = TYPES.get(code, RecipeError)
    return kind(message, code)
