"""transformers: its logging while a run lasts, and one function of a modelling file in another form."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from luthier import compat


def quiet_transformers() -> None:
    """No progress bars and no warnings while models are loaded; as before at the end of a run."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def restore() -> None:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    compat.on_exit(restore)


def replace_function(module: Any, name: str, function: Callable) -> None:
    """Put a function in the place of a module's, until the run ends."""
    own = getattr(module, name)
    setattr(module, name, function)
    compat.on_exit(lambda: setattr(module, name, own))


def add_entry(table: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Add an entry to one of transformers' tables, until the run ends; one that is there stays."""
    if name not in table:
        set_entry(table, name, value)


def set_entry(table: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Set an entry of one of transformers' tables, until the run ends."""
    had, old = name in table, table.get(name)

    def restore() -> None:
        if had:
            table[name] = old
        else:
            table.pop(name, None)

    table[name] = value
    compat.on_exit(restore)
