"""The last block's MLP reads only the places whose states are asked for: nobody hears what it says of the
others.

Attention needs every place, up to the keys and values of the last block; behind it a place speaks for itself
alone. In place of what is not read stands 0. Whatever sits inside the MLP comes along (adapters, gradients of
weights); where somebody listens there (hooks), or layers are computed again in backward, it reads everything.
The plain twin is the network as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from luthier.kernels import differentiated_otherwise
from luthier.model.anatomy import layer_of

MOST = 0.75  # share of the places up to which picking them out is worth it
_found: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # model -> its last block, and the MLP in it


@contextmanager
def alone(model: nn.Module, at: Tensor, places: int) -> Iterator[None]:
    """While the network reads so many flat places, its last MLP is handed those in `at` only."""
    wanted, found = at.unique(), last_block(model)
    if found is None or len(wanted) > MOST * places or differentiated_otherwise() or _watched(*found):
        yield
        return
    mlp = found[1]
    shape: list[int] = []

    def pick(module: nn.Module, given: tuple[Any, ...]) -> Any:
        if len(given) == 1 and given[0].shape[:-1].numel() == places:
            shape[:] = given[0].shape[:-1]
            return given[0].flatten(0, -2).index_select(0, wanted)[None]

    def put(module: nn.Module, given: Any, out: Tensor) -> Any:
        if shape:
            return out.new_zeros(places, out.shape[-1]).index_copy(0, wanted, out[0]).unflatten(0, shape)

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_block(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The block that comes last, and the one module in it of a class that is called MLP."""
    if model not in _found:
        inside = [
            (place, m)
            for name, m in model.named_modules()
            if type(m).__name__.endswith("MLP") and (place := layer_of(f"{name}."))
        ]
        last = [m for place, m in inside if place == inside[-1][0]]
        _found[model] = (
            (model.get_submodule("{}.{}".format(*inside[-1][0])), *last) if len(last) == 1 else None
        )
    return _found[model]


def _watched(block: nn.Module, mlp: nn.Module) -> bool:
    """Does somebody want to hear everything?"""
    again = getattr(block, "gradient_checkpointing", False) or block._compiled_call_impl is not None
    return again or any(m._forward_hooks or m._forward_pre_hooks for m in mlp.modules())
