"""Every touch on another library's inside, each with what and why, applied for a while and taken back.

A patch is a function that changes something and returns the function that restores it. In library use patches
hold for a run: `session()` is entered by a run, and its outermost exit restores everything, the last first.
The command line's own process keeps them (`keep()`), since nothing else lives in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Restore = Callable[[], None]


@dataclass(frozen=True)
class Patch:
    """What is changed in another library, and why."""

    name: str
    library: str
    what: str
    why: str


PATCHES = (
    Patch(
        "rotary",
        "transformers",
        "`apply_rotary_pos_emb` in a model's modelling file",
        "one pass over q and k",
    ),
    Patch("attention", "transformers", "an entry `luthier` among its attention functions", "packed batches"),
    Patch(
        "logging",
        "transformers",
        "verbosity and progress bars while a model is loaded",
        "one progress display per run",
    ),
    Patch(
        "peft_types",
        "peft",
        "members of `PeftType`, its mappings of types",
        "luthier's tuners are PEFT types",
    ),
    Patch(
        "malloc",
        "glibc",
        "`mallopt`: freed memory stays with the process",
        "saves a quarter of a step on CPUs",
    ),
    Patch(
        "lazy_imports",
        "torch, transformers",
        "placeholders for modules that the process does not use; command line only",
        "saves two thirds of the time to import a model class",
    ),
    Patch(
        "import_structure",
        "transformers",
        "the list of its lazy modules is read once; command line only",
        "saves 0.3 s at start",
    ),
    Patch(
        "gc",
        "python",
        "thresholds of the garbage collector; command line only",
        "saves an eighth of the start",
    ),
)

_depth = 0
_permanent = False
_restores: list[Restore] = []


def keep() -> None:
    """Let every patch of this process stay: for the command line, where nothing else lives."""
    global _permanent
    _permanent = True


def keeps() -> bool:
    """Whether this process keeps patches."""
    return _permanent


def active() -> bool:
    """Whether patches may be applied now: within a run, or in the command line's process."""
    return _permanent or _depth > 0


def on_exit(restore: Restore) -> None:
    """Have something restored when the outermost session ends; outside of one it stays."""
    if _depth > 0 and not _permanent:
        _restores.append(restore)


@contextmanager
def session() -> Iterator[None]:
    """For as long as a run lasts. Sessions may lie within each other."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            while _restores:
                _restores.pop()()
