"""The last block's MLP reads only the positions whose hidden states are used: nothing depends on its output
at the others.

Attention needs every position, up to the keys and values of the last block; behind it each position is by
itself. What is not read stands as 0. Whatever sits inside the MLP comes along (adapters, gradients of
weights); where something is hooked in there, or layers are computed again in backward, it reads everything.
The plain twin is the network as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kernels._switch import differentiated_otherwise
from luthier.kernels.transfer import to_device

MOST = 0.75  # share of the positions up to which picking them out is worth it


@contextmanager
def read_only(
    last: tuple[nn.Module, nn.Module] | None, at: Tensor, size: int, device: torch.device | None = None
) -> Iterator[None]:
    """While the network reads `size` flat positions, its last MLP is handed those in `at` only. device: the
    network's, where `at` lies elsewhere.

    last: the network's last block and the MLP in it (model.anatomy.last_mlp); None: nothing is done.
    """
    positions = at.unique()
    if last is None or len(positions) > MOST * size or differentiated_otherwise():
        yield
        return
    block, mlp = last
    recomputed = getattr(block, "gradient_checkpointing", False)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in mlp.modules())
    if recomputed or hooked or block._compiled_call_impl is not None:
        yield
        return
    if device is not None:
        positions = to_device({"": positions}, device)[""]
    shape: list[int] = []  # of the positions, while the MLP runs

    def pick(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if len(args) != 1 or args[0].shape[:-1].numel() != size:
            return None
        shape[:] = args[0].shape[:-1]
        return args[0].flatten(0, -2).index_select(0, positions)[None]

    def put(module: nn.Module, args: Any, out: Tensor) -> Any:
        if not shape:
            return None
        return out.new_zeros(size, out.shape[-1]).index_copy(0, positions, out[0]).unflatten(0, shape)

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
