"""transformers: its logging while a run lasts, and entries of its tables and modules."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from luthier import compat


def quiet_transformers() -> None:
    """No progress bars and no warnings while a run lasts; outside of runs as `quiet` does."""
    from transformers.utils import logging

    if not compat.active():
        return
    compat.on_exit(partial(logging.set_verbosity, logging.get_verbosity()))
    if logging.is_progress_bar_enabled():
        compat.on_exit(logging.enable_progress_bar)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings while a model is loaded outside of runs."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        if not compat.keeps():
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def add_entry(table: MutableMapping[str, Any], name: str, value: Any, replace: bool = False) -> None:
    """Add an entry to one of transformers' tables, or to the names of a module (`vars(module)`), until no run
    and no model needs it. An entry that is there stays, unless `replace` says otherwise.
    """
    if name not in table:
        compat.on_exit(lambda: table.pop(name, None))
    elif replace:
        compat.on_exit(partial(table.__setitem__, name, table[name]))
    else:
        return
    table[name] = value
