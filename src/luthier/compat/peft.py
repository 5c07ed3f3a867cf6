"""Lets plain PEFT load what luthier saved: after `import luthier`, whichever of the two came first.

`import luthier` must cost nothing, so nothing is imported here: a finder waits for the first `import peft`
and has tuners/_peft.py register our types right after it. Call `watch()` once, as the last line of
luthier/__init__.py.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

from luthier.compat.lazy_imports import after

BRIDGE = "luthier.methods.tuners._peft"  # registers every Delta, when it is imported or asked to
eager = True  # the first


def register(peft: ModuleType) -> None:
    """A PEFT that we do not know must still be usable without us."""
    if not eager:
        return
    try:
        import_module(BRIDGE)
    except Exception as error:
        warnings.warn(f"PEFT does not know luthier's adapters in this process: {error}", stacklevel=2)


def watch() -> None:
    """Register our tuners with PEFT: now where it is imported already, else as soon as it is."""
    after("peft", register)


def lazily() -> None:
    """In a process of our own, before PEFT is imported: all of them only when PEFT looks for a type that it
    does not know. A run uses one, and importing the others would take it longer than its first step."""
    if "peft" not in sys.modules:
        after("peft.mapping", wait)


def wait(mapping: ModuleType) -> None:
    """Where PEFT keeps its types as we know it."""
    global eager
    known = getattr(mapping, TYPES, None)
    if isinstance(known, dict):
        setattr(mapping, TYPES, Types(known))
        eager = False


TYPES = "PEFT_TYPE_TO_CONFIG_MAPPING"


class Types(dict):
    """PEFT's types, and ours once they are asked for."""

    def __missing__(self, key: Any) -> Any:
        import_module(BRIDGE).register()
        if key not in self:
            raise KeyError(key)
        return self[key]
