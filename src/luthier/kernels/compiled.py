"""torch.compile of a network's layers (`torch_compile: true`), one by one: layers alike are compiled once,
for any length.

Off by default: a first call that compiles takes longer than many a run. What the layers are is said by the
network (the modules that transformers does not split over devices). Attention stays as it is
(attention.exclude_from_compile), since its plan changes with every batch and would be compiled anew each
time; LoRA is written out in plain operations, for the compiler to fuse. The first batch is compared with the
network's own code, as every fast path is.
"""

from __future__ import annotations

from torch import nn

from luthier.errors import RecipeError
from luthier.kernels._switch import State


def compile_blocks(model: nn.Module) -> int:
    """Compile each layer when it is first run; how many there are. Raises RecipeError where the network does
    not say what its layers are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    if not blocks:
        raise RecipeError(
            f"torch_compile: {type(model).__name__} does not declare which modules are its"
            " layers (_no_split_modules); leave torch_compile out"
        )
    for block in blocks:
        block.compile(dynamic=True)
    State.compiled = True  # there is something that `plainly` has to switch off
    return len(blocks)
