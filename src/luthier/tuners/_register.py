"""Lets plain PEFT load what luthier saved: after `import luthier`, whichever of the two came first.

`import luthier` must cost nothing, so nothing is imported here: a finder waits for the first `import peft` and has
tuners/_peft.py register our types right after it. Call `watch()` once, as the last line of luthier/__init__.py.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from luthier.later import after

BRIDGE = "luthier.tuners._peft"  # registers every Delta when it is imported


def register(peft: ModuleType) -> None:
    """A PEFT that we do not know must still be usable without us."""
    try:
        importlib.import_module(BRIDGE)
    except Exception as error:
        warnings.warn(f"PEFT does not know luthier's adapters in this process: {error}", stacklevel=2)


def watch() -> None:
    """Register our tuners with PEFT: now where it is imported already, else as soon as it is."""
    after("peft", register)
