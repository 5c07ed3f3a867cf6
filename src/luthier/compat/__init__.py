"""Every touch on another library's inside, each with what and why, applied for a while and taken back.

A patch is a function that changes something and returns the function that restores it. In library use patches
hold for a run: `session()` is entered by a run, and when the last run has ended everything is restored, the
last first. A model that is loaded outside of runs holds the entries that it computes with for as long as it
lives (`hold()`). The command line's own process keeps all of them (`keep()`), since nothing else lives in it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")
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
    Patch("quantizers", "transformers", "an entry `luthier` among its quantizers", "bases saved as codes"),
    Patch("activations", "transformers", "an entry `crrelu` among its activations", "networks tuned to it"),
    Patch(
        "logging",
        "transformers",
        "verbosity and progress bars while a model is loaded",
        "one progress display per run",
    ),
    Patch(
        "chat_templates",
        "transformers",
        "`_compile_jinja_template`, while a chat template is rendered",
        "limits on the time and memory of templates",
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
    Patch("optuna", "optuna", "verbosity during a search", "one progress display per search"),
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

_lock = threading.RLock()  # runs may go on in several threads
_loading = threading.RLock()
_permanent = False
_runs = 0
_models = 0  # loaded outside of runs, and alive
_after_runs: list[Restore] = []
_after_models: list[Restore] = []


def keep() -> None:
    """Let every patch of this process stay: for the command line, where nothing else lives."""
    global _permanent
    _permanent = True


def keeps() -> bool:
    """Whether this process keeps patches."""
    return _permanent


def active() -> bool:
    """Whether patches may be applied now: within a run, or in the command line's process."""
    return _permanent or _runs > 0


def on_exit(restore: Restore) -> None:
    """Have something restored when the last run has ended; outside of runs, when the last model that was
    loaded there is gone. With neither it stays.
    """
    with _lock:
        if _permanent:
            return
        if _runs > 0:
            _after_runs.append(restore)
        elif _models > 0:
            _after_models.append(restore)


@contextmanager
def session() -> Iterator[None]:
    """For as long as a run lasts. Sessions may lie within each other, and beside each other in threads."""
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            while _runs == 0 and _after_runs:
                _after_runs.pop()()


@contextmanager
def loading() -> Iterator[None]:
    """For as long as a model is loaded outside of runs; what it needs is restored at the end, unless the
    model is held.
    """
    _add_model()
    try:
        yield
    finally:
        _remove_model()


def one_at_a_time(load: Callable[P, R]) -> Callable[P, R]:
    """Let one thread load at a time: while transformers and PEFT load a model they replace functions of torch
    and of their own for a while, and two threads would restore each other's.
    """

    @wraps(load)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _loading:
            return load(*args, **kwargs)

    return locked


def hold(model: Any) -> None:
    """What a model needs stays for as long as it lives."""
    _add_model()
    weakref.finalize(model, _remove_model).atexit = False


def _add_model() -> None:
    global _models
    with _lock:
        _models += 1


def _remove_model() -> None:
    global _models
    with _lock:
        _models -= 1
        while _models == 0 and _after_models:
            _after_models.pop()()
