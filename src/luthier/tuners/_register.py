"""Lets plain PEFT load what luthier saved: after `import luthier`, whichever of the two came first.

`import luthier` must cost nothing, so nothing is imported here: a finder waits for the first `import peft` and has
tuners/_peft.py register our types right after it. Call `watch()` once, as the last line of luthier/__init__.py.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import Any

BRIDGE = "luthier.tuners._peft"  # registers every Delta when it is imported


class AfterPeft(MetaPathFinder):
    """Finds `peft` as the other finders would, and runs the bridge once it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None):
        if name != "peft":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((s for s in specs if s is not None), None)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            del spec.loader.exec_module  # the loader is as it was
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                importlib.import_module(BRIDGE)
            except Exception as error:  # a PEFT that we do not know must still be usable without us
                warnings.warn(f"PEFT does not know luthier's adapters in this process: {error}", stacklevel=2)

        spec.loader.exec_module = exec_module
        return spec


def watch() -> None:
    """Register our tuners with PEFT: now where it is imported already, else as soon as it is."""
    if "peft" in sys.modules:
        importlib.import_module(BRIDGE)
    elif not any(isinstance(f, AfterPeft) for f in sys.meta_path):
        sys.meta_path.insert(0, AfterPeft())
