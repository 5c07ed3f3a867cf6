"""Weights displaced layer by layer: each layer's while it computes, and no others.

A copy of all that moves would double the memory of a network that is tuned whole. A layer's weights are read
while the layer computes; so they are exchanged for displaced ones as it begins and put back as it ends. What
lies outside of layers (embeddings, the head, last norms) is displaced all the while: objectives may read it,
and the weights of layers are read by the network alone. Nothing is written to: the weights are what they
were, bit for bit, however the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.methods.estimators._base import Rounding, displaced, perturbed
from luthier.methods.tuners._base import ParamGroup
from luthier.model.anatomy import layer_of

if TYPE_CHECKING:
    from luthier.train.optimizer import Chain

Aside = Callable[[ParamGroup, str, Tensor], "Tensor | None"]
Moving = tuple[ParamGroup, str, nn.Parameter]
SMALL = 8  # what moves is displaced as a whole where it is less than one part in so many


@dataclass
class Places:
    """Where the moving parameters stand."""

    outside: dict[int, nn.Parameter] = field(default_factory=dict)  # by id: those that are in no layer alone
    layers: dict[nn.Module, list[Moving]] = field(default_factory=dict)

    def displaced_bytes(self) -> int:
        """Of the displaced tensors that exist at once: those outside, and those of the largest layer."""
        sizes = [sum(p.nbytes for _, _, p in moving) for moving in self.layers.values()]
        return sum(p.nbytes for p in self.outside.values()) + max(sizes, default=0)


def places(chain: Chain) -> Places:
    """Which of the moving parameters stand in which layer. All count as outside where they are few, or where
    layers are compiled and run no hooks.
    """
    model = chain.attached.model
    moving: list[Moving] = []
    for group in chain.param_groups():
        moving += [(group, slot, p) for slot, p in group.params.items() if p.requires_grad]
    where = Places(outside={id(p): p for _, _, p in moving})
    size = sum(p.nbytes for p in where.outside.values())
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    if compiled or SMALL * size < sum(p.nbytes for p in model.parameters()):
        return where
    owners: dict[int, set[str]] = {}  # parameter -> the layers that hold it, "" for what is none
    for name, module in model.named_modules(remove_duplicate=False):
        at = layer_of(f"{name}.")
        for p in module._parameters.values():
            owners.setdefault(id(p), set()).add(f"{at[0]}.{at[1]}" if at else "")
    for group, slot, p in moving:
        layers = owners.get(id(p), {""})
        if len(layers) == 1 and "" not in layers:
            layer = model.get_submodule(min(layers))
            where.layers.setdefault(layer, []).append((group, slot, p))
            del where.outside[id(p)]
    return where


class LayerByLayer:
    """Hooks on layers that displace what moves in them while they compute."""

    def __init__(self, layers: dict[nn.Module, list[Moving]], aside: Aside, rounding: Rounding | None):
        self.layers, self.aside, self.rounding = layers, aside, rounding
        self.opposite = False
        self.originals = {id(p): p.data for moving in layers.values() for _, _, p in moving}
        self.displaced: set[int] = set()  # ids of parameters
        self.hooks: list[Any] = []
        for layer in layers:
            self.hooks.append(layer.register_forward_pre_hook(self.begin))
            self.hooks.append(layer.register_forward_hook(self.end, always_call=True))

    @torch.no_grad()
    def begin(self, layer: nn.Module, _: Any) -> None:
        for group, slot, p in self.layers[layer]:
            was = self.originals[id(p)]
            if p.data_ptr() != was.data_ptr():
                continue  # a role's tensors stand in for these
            d = self.aside(group, slot, p)
            if d is None:
                continue
            p.data = displaced(was, d, None if self.opposite else self.rounding)
            if self.opposite:
                p.data.lerp_(was, 2.0)
            self.displaced.add(id(p))

    def end(self, layer: nn.Module, *args: Any) -> None:
        for _, _, p in self.layers[layer]:
            if id(p) in self.displaced:
                p.data = self.originals[id(p)]
                self.displaced.remove(id(p))

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            self.end(layer)


@contextmanager
def perturbed_by_layer(chain: Chain, aside: Aside) -> Iterator[Callable[[], None]]:
    """As `perturbed` (estimators/_base.py), with the displaced tensors of one layer at a time. `aside` is
    called anew each time that a layer computes, and must answer the same.
    """
    where = places(chain)
    rounding = Rounding() if chain.clock.step == chain.clock.first else None

    def outside(group: ParamGroup, slot: str, p: Tensor) -> Tensor | None:
        return aside(group, slot, p) if id(p) in where.outside else None

    with perturbed(chain, outside, rounding) as flip_outside:
        inside = LayerByLayer(where.layers, aside, rounding)
        if rounding is not None and not where.layers:
            rounding.check()

        def flip() -> None:
            if rounding is not None:
                rounding.check()
            inside.opposite = True
            flip_outside()

        try:
            yield flip
        finally:
            inside.stop()
