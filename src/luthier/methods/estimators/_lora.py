"""LoRA modules that are trained under a perturbation of their weights: finding them, and modifying their
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from luthier.errors import RecipeError


def lora_groups(chain: Any):
    """Name, module and site of every LoRA that moves on a linear module."""
    layers = chain.attached.layers
    for group in chain.param_groups():
        layer = layers.get(group.name)
        if (
            layer is not None
            and {"A", "B"} <= group.params.keys()
            and not isinstance(layer.get_base_layer(), nn.Embedding)
            and not isinstance(layer, ParamWrapper)  # of fused experts: no output of its own to modify
        ):
            yield group.name, layer, group


def scale_of(layer: Any) -> float:
    """s of s B A."""
    if not hasattr(layer, "scaling"):
        raise RecipeError("estimators 'ggpo' and 'mgpo' work only with LoRA tuners")
    return next(iter(layer.scaling.values()))


@torch.no_grad()
def full_gradient(slots: Any, grads: Any, scale: float) -> Tensor:
    """[out, in] what the gradients of A [r, in] and B [out, r] tell of the gradient of the whole weight."""
    return scale * (slots["B"].float() @ grads["A"].float() + grads["B"].float() @ slots["A"].float())


@contextmanager
def modified_outputs(changes: Iterable[tuple[Any, Callable[[Tensor, Tensor], Tensor]]]) -> Iterator[None]:
    """For a while modules say change(x, y) in place of y, x [.., in] being what they read. No weight is
    written.
    """
    hooks = []
    try:
        for layer, change in changes:
            hooks.append(layer.register_forward_hook(lambda m, args, y, change=change: change(args[0], y)))
        yield
    finally:
        for h in hooks:
            h.remove()
