"""Whether torch.compile can work on this machine."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from luthier.errors import RecipeError


def check_compiler() -> None:
    """Raises RecipeError where torch has nothing to compile with: triton on a GPU, a C++ compiler on a
    CPU.
    """
    import torch

    if torch.cuda.is_available():
        if find_spec("triton") is None:
            raise RecipeError(
                "torch_compile: needs triton on a GPU, which is not installed; install it, or"
                " leave torch_compile out"
            )
        return
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"])):
        return
    missing = "no C++ compiler was found (g++ or clang++)"
    if named:
        missing = f"the compiler in CXX, {named}, does not exist"
    raise RecipeError(f"torch_compile: {missing}; install one, or leave torch_compile out")
