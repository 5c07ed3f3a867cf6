"""What a network does on a few rows, matrix by matrix: how strongly each input comes in, how much each entry
matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.tuners._delta import oriented

if TYPE_CHECKING:
    from luthier.model.network import Network

MICRO = 4  # rows of a batch


def matrices(model: Network) -> dict[str, Any]:
    """Every linear module by name (GPT-2's Conv1D is one)."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


@torch.no_grad()
def input_norms(model: Network, rows: list[dict], roles: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """name of a linear module -> its weight [out, in], and [in] the 2-norm of each of its inputs over all
    tokens of the rows.
    """
    found = matrices(model)
    squares: dict[str, Tensor] = {}

    def see(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2).float().square().sum(0)
            squares[name] = squares[name] + x if name in squares else x

        return hook

    hooks = [m.register_forward_pre_hook(see(n)) for n, m in found.items()]
    try:
        for row in rows:  # one at a time: no filling is read
            roles.policy.logprobs(roles.batch([row]))
    finally:
        for h in hooks:
            h.remove()
    return {n: (oriented(found[n]), s.sqrt()) for n, s in squares.items()}


def squared_gradients(modules: dict[str, Any], rows: list[dict], roles: Any) -> dict[str, Tensor]:
    """name -> [out, in] the squared gradient of each entry of a frozen weight, summed over batches of the
    mean -log p per token.
    """
    weights = {n: m.weight for n, m in modules.items()}
    total = {n: torch.zeros(w.shape, dtype=torch.float32, device=w.device) for n, w in weights.items()}

    def add(name: str):
        def hook(p: Tensor) -> None:
            if p.grad is not None:
                total[name] += p.grad.float().square()
            p.grad = None

        return hook

    hooks = [w.requires_grad_(True).register_post_accumulate_grad_hook(add(n)) for n, w in weights.items()]
    try:
        with torch.enable_grad():
            for i in range(0, len(rows), MICRO):
                roles.policy.logprobs(roles.batch(rows[i : i + MICRO])).mean().neg().backward()
    finally:
        for h in hooks:
            h.remove()
        for w in weights.values():
            w.requires_grad_(False)
    return {n: s.T if isinstance(modules[n], Conv1D) else s for n, s in total.items()}
