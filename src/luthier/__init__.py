"""luthier: tune foundation models in every way the literature knows, from one recipe, and see what tuning
changed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from luthier.version import __version__

# read when huggingface_hub is imported: nobody is told what is tuned here
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_WHERE = {  # what the package offers, imported when first asked for
    "tune": "luthier.run.run",
    "Report": "luthier.run.run",
    "Recipe": "luthier.recipe.recipe",
    "RecipeError": "luthier.errors",
    "load": "luthier.model.loaded",
    "register_peft": "luthier.compat.peft",
    "attach": "luthier.interop.attach",
    "callbacks": "luthier.interop.attach",
    "follow": "luthier.interop.attach",
    "trainer_loss": "luthier.interop.loss",
    "inspect": "luthier.serve.inspect",
    "compare": "luthier.study.compare",
    "evaluate": "luthier.serve.benchmarks",
    "search": "luthier.study.search",
}
__all__ = [
    "Recipe",
    "RecipeError",
    "Report",
    "__version__",
    "attach",
    "callbacks",
    "compare",
    "evaluate",
    "follow",
    "inspect",
    "load",
    "register_peft",
    "search",
    "trainer_loss",
    "tune",
]

if TYPE_CHECKING:
    from luthier.compat.peft import register_peft
    from luthier.errors import RecipeError
    from luthier.interop.attach import attach, callbacks, follow
    from luthier.interop.loss import trainer_loss
    from luthier.model.loaded import load
    from luthier.recipe.recipe import Recipe
    from luthier.run.run import Report, tune
    from luthier.serve.benchmarks import evaluate
    from luthier.serve.inspect import inspect
    from luthier.study.compare import compare
    from luthier.study.search import search


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'luthier' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
