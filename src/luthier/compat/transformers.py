"""transformers: its logging while a run lasts, entries of its tables and modules, how chat templates are
compiled while one is rendered, and names that change between its versions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partial
from typing import Any

from luthier import compat

_templates = threading.Lock()
_renderings = 0
_original_compile: Any = None


@cache
def cache_name() -> str:
    """What networks call the keys and values of earlier tokens, as an argument and in what they return:
    `cache` since transformers 5.24, which warns of the name before it, `past_key_values`, and is to lose it.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def cache_of(output: Any) -> Any:
    """The keys and values that a network returns."""
    return getattr(output, cache_name())


def with_cache(states: Any) -> dict[str, Any]:
    """Keys and values as an argument of a network."""
    return {cache_name(): states}


def checkpoint_activations(model: Any) -> None:
    """Have a network's layers computed again in backward, instead of storing what backward reads. Since
    transformers 5.24, `gradient_checkpointing_enable` warns that it is to go.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


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


@contextmanager
def quiet_gguf() -> Iterator[None]:
    """As `quiet`, while a GGUF is read: its bar is tqdm's own, which does not follow transformers' switch."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    original = reader.tqdm
    reader.tqdm = logging.tqdm
    try:
        with quiet():
            yield
    finally:
        reader.tqdm = original


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


@contextmanager
def compile_templates_with(compile_template: Callable[[Any, str], Any]) -> Iterator[None]:
    """While within, transformers compiles chat templates by `compile_template(its own way, template)`; always
    the same one, for several threads may render at once.
    """
    global _renderings, _original_compile
    from transformers.utils import chat_template_utils

    with _templates:
        if not _renderings:
            _original_compile = chat_template_utils._compile_jinja_template
            chat_template_utils._compile_jinja_template = partial(compile_template, _original_compile)
        _renderings += 1
    try:
        yield
    finally:
        with _templates:
            _renderings -= 1
            if not _renderings:
                chat_template_utils._compile_jinja_template = _original_compile
