"""Sub-networks of one network, as masks and as sliced models: the first heads and feed-forward units of each
layer, or no layer at all.

A shape is a tuple with (groups of heads, feed-forward units) of each layer; (0, 0) is a layer that is left
out. A group consists of the heads that share keys and values: one head, or several with grouped queries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.model.anatomy import layer_of, part_of

Shape = tuple[tuple[int, int], ...]
# parts that lose rows -> of which entry of a layer's shape
ROWS = {"q": 0, "k": 0, "v": 0, "up": 1, "gate": 1}
COLUMNS = {"o": 0, "down": 1}  # parts that lose columns


class Anatomy:
    """Where the matrices of each layer are. Raises RecipeError where a network has no separate q, k, v, o, up
    and down, or several lists of layers.
    """

    def __init__(self, model: Any, tuner: str):
        text = model.config.get_text_config()
        self.heads = getattr(text, "num_attention_heads", 0)
        self.groups = getattr(text, "num_key_value_heads", None) or self.heads
        self.layers: list[dict[str, str]] = []
        places: dict[tuple[str, int], dict[str, str]] = {}
        for name, module in model.named_modules():
            part = part_of(name) if isinstance(module, nn.Linear) else None
            if part:
                places.setdefault(layer_of(f"{name}.") or ("", 0), {})[part] = name
        self.layers = list(places.values())
        if not self.layers or any(
            not {"q", "k", "v", "o", "up", "down"} <= layer.keys() for layer in self.layers
        ):
            raise RecipeError(
                f"tuner '{tuner}': {type(model).__name__} has no separate q, k, v, o, up and down modules in"
                " each layer, so no parts can be left out"
            )
        stacks = dict.fromkeys(where for where, _ in places)
        if len(stacks) > 1:  # encoder and decoder, or a tower beside the language model: unlike layers
            raise RecipeError(
                f"tuner '{tuner}': {type(model).__name__} has {len(stacks)} lists of layers"
                f" ({', '.join(stacks)}), and sub-networks are parts of a single one"
            )
        self.width = model.get_submodule(self.layers[0]["down"]).in_features
        first = next(iter(places))
        inner = {n for n, _ in model.get_submodule(f"{first[0]}.{first[1]}").named_children()}
        # with norms before its halves, a silent layer is none
        self.skips = bool(inner & {"input_layernorm", "layernorm_before"})

    @property
    def whole(self) -> Shape:
        return ((self.groups, self.width),) * len(self.layers)

    def slice_size(self, part: str, n: int, size: int) -> int:
        """How many of a matrix's `size` rows or columns n units are."""
        units = self.groups if {**ROWS, **COLUMNS}[part] == 0 else self.width
        return size // units * n

    def check(self, shape: Shape) -> None:
        """Raises RecipeError for what is no shape of this network."""
        whole = self.whole
        fits = len(shape) == len(whole) and all(
            0 <= a <= A and 0 <= b <= B and (a > 0) == (b > 0) for (a, b), (A, B) in zip(shape, whole)
        )
        if not fits or not any(a for a, _ in shape):
            raise RecipeError(
                f"{shape} is not a valid sub-network: expected {len(whole)} layers of up to"
                f" {whole[0]} (groups of heads, units), or (0, 0)"
            )
        if not self.skips and any(a == 0 for a, _ in shape):
            raise RecipeError(
                "this model applies its norms after each block (post-norm), so no layer can be left out"
            )


@contextmanager
def masked(model: Any, anatomy: Anatomy, shape: Shape) -> Iterator[None]:
    """The network as one of its sub-networks, for a while: what a unit says is not read."""
    anatomy.check(shape)
    hooks = []

    def cut(n: int):
        return lambda module, args: (
            torch.cat([args[0][..., :n], torch.zeros_like(args[0][..., n:])], -1),
            *args[1:],
        )

    def silent(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    try:
        for layer, units in zip(anatomy.layers, shape, strict=True):
            for part, which in COLUMNS.items():
                module = model.get_submodule(layer[part])
                n = anatomy.slice_size(part, units[which], module.in_features)
                if not n:
                    hooks.append(module.register_forward_hook(silent))
                elif n < module.in_features:
                    hooks.append(module.register_forward_pre_hook(cut(n)))
        yield
    finally:
        for h in hooks:
            h.remove()


@torch.no_grad()
def reorder(model: Any, layer: dict[str, str], which: int, order: Tensor) -> None:
    """Groups of heads (which: 0) or units (1) of a layer in another order, in place: the network answers as
    before.
    """
    for part, name in layer.items():
        if {**ROWS, **COLUMNS}.get(part) != which:
            continue
        module, side = model.get_submodule(name), 0 if part in ROWS else 1
        size = module.weight.shape[side] // len(order)
        at = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
        module.weight.copy_(module.weight.index_select(side, at))
        if side == 0 and module.bias is not None:
            module.bias.copy_(module.bias[at])


def sliced(model: Any, anatomy: Anatomy, shape: Shape) -> Any:
    """A copy that has only what the sub-network reads. All kept layers alike, it is a plain model that can be
    saved.
    """
    anatomy.check(shape)
    smaller = copy.deepcopy(model)
    for layer, units in zip(anatomy.layers, shape, strict=True):
        for part, name in layer.items():
            module: Any = smaller.get_submodule(name)
            which = {**ROWS, **COLUMNS}.get(part)
            if which is None or not units[which]:
                continue
            side = 0 if part in ROWS else 1
            n = anatomy.slice_size(part, units[which], module.weight.shape[side])
            module.weight = nn.Parameter(
                module.weight.detach().narrow(side, 0, n).clone(), module.weight.requires_grad
            )
            module.out_features, module.in_features = module.weight.shape
            if side == 0 and module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach()[:n].clone(), module.bias.requires_grad)
    remaining = [i for i, (a, _) in enumerate(shape) if a]
    where = (layer_of(f"{anatomy.layers[0]['o']}.") or ("", 0))[0]
    above, _, leaf = where.rpartition(".")
    layers = [smaller.get_submodule(f"{where}.{i}") for i in remaining]
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    setattr(smaller.get_submodule(above), leaf, nn.ModuleList(layers))
    text = smaller.config.get_text_config()
    text.num_hidden_layers = len(remaining)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in remaining]
    if len({shape[i] for i in remaining}) == 1:
        groups, width = shape[remaining[0]]
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // anatomy.heads
        text.num_attention_heads, text.intermediate_size = anatomy.heads // anatomy.groups * groups, width
        if getattr(text, "num_key_value_heads", None):
            text.num_key_value_heads = groups
    return smaller


def macs(model: Any, anatomy: Anatomy, shape: Shape) -> int:
    """Multiplications with weights of linear modules that a token costs in a sub-network; attention itself is
    not counted.
    """
    inside = {name for layer in anatomy.layers for name in layer.values()}
    total = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in inside
    )
    for layer, units in zip(anatomy.layers, shape, strict=True):
        for part, name in layer.items():
            rows, columns = model.get_submodule(name).weight.shape
            which = {**ROWS, **COLUMNS}.get(part, 0)
            total += (
                anatomy.slice_size(part, units[which], rows) * columns
                if part in ROWS
                else rows * anatomy.slice_size(part, units[which], columns)
            )
    return total
