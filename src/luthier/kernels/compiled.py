"""torch.compile of a network's layers (`torch_compile: true`), one by one: layers alike are compiled once,
for any length.

Off by default: a first call that compiles takes longer than many a run. What the layers are is said by the
network (the modules that transformers does not split over devices). Attention stays as it is, since its plan
changes with every batch and would be compiled anew each time; LoRA is written out in plain operations, for
the compiler to fuse. The first batch is compared with the network's own code, as every fast path is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from luthier.compat.transformers import set_entry
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.model.network import Network

_used = False  # has anything been compiled in this process?


def compile_blocks(model: Network) -> int:
    """Compile each layer when it is first run; how many there are. Raises RecipeError where the network does
    not say what its layers are.
    """
    from luthier.kernels import attention

    names = {*(getattr(model, "_no_split_modules", None) or ())}
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    if not blocks:
        raise RecipeError(
            f"torch_compile: {type(model).__name__} does not say which of its modules are layers; leave"
            " torch_compile out"
        )
    if attention.takes_plans(model):
        from transformers import AttentionInterface

        plain = torch.compiler.disable(attention.attention)
        set_entry(AttentionInterface._global_mapping, attention.NAME, plain)
    for block in blocks:
        block.compile(dynamic=True)
    global _used
    _used = True
    return len(blocks)


def within(model: torch.nn.Module) -> bool:
    """Is any of its layers compiled?"""
    return any(m._compiled_call_impl is not None for m in model.modules())


def uncompiled() -> AbstractContextManager[Any]:
    """The layers' own code, for a while."""
    return torch.compiler.set_stance("force_eager") if _used else nullcontext()
