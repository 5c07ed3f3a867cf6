"""Bottleneck adapters: two small layers with a nonlinearity between them. They cannot be merged into a
weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._delta import Delta
from luthier.model.anatomy import layer_of, part_names, part_of, part_pattern
from luthier.model.experts import joined_weights
from luthier.model.linear import linear_modules
from luthier.registry import Choices, family

if TYPE_CHECKING:
    from luthier.methods.tuners._base import TunedModel
    from luthier.model.network import Network

Activation = Literal["relu", "gelu", "silu", "tanh", "linear"]
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "linear": lambda h: h}
SUBLAYERS = {"o": "attention", "down": "feed-forward"}  # a sublayer's last matrix -> the sublayer


def pair(width: int, k: int, out_: int, name: str = "") -> dict[str, Tensor]:
    """The tensors of one bottleneck: from width to k, from k to out_, where up starts at zero."""
    tensors = {
        "down": torch.randn(k, width) * 0.02,
        "down_bias": torch.zeros(k),
        "up": torch.zeros(out_, k),
        "up_bias": torch.zeros(out_),
    }
    return {f"{name}{part}": t for part, t in tensors.items()}


def through(
    h: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, non_linearity: str
) -> Tensor:
    """up(f(down(h)))"""
    f = FUNCTIONS[non_linearity]
    return F.linear(f(F.linear(h, down, down_bias)), up, up_bias)


NARROWER = Choices(2, 4, 8, 16, 32, 64)  # times; what a search goes over


@family
class Bottleneck(Delta):
    """Family: up(f(down(h))), down to width / reduction_factor; up starts at zero."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)
    parallel: ClassVar[bool] = False  # h is what the module reads; else what it says
    # with target_modules auto: the last matrices of these sublayers, whatever a network calls them
    places: ClassVar[tuple[str, ...]] = ()

    # width of h divided by that of the bottleneck
    reduction_factor: Annotated[float, Field(ge=1), NARROWER] = 16
    non_linearity: Activation = "relu"  # nonlinearity f

    def attach(self, model):
        if self.target_modules != "auto":
            return self.put(model)
        names, warnings = self.sublayer_ends(model)
        attached = replace(self, target_modules=part_pattern(names)).put(model)
        attached.warnings += warnings
        return attached

    def ends(self) -> tuple[str, ...]:
        """With target_modules auto: what the matrices are that have an adapter."""
        return self.places

    def put(self, model: Network) -> TunedModel:
        """On a network whose modules the settings name."""
        return super().attach(model)

    def sublayer_ends(self, model: Network) -> tuple[list[str], tuple[str, ...]]:
        """The last matrices of a network's sublayers, as they are called inside a layer, and warnings where
        layers have none. Raises RecipeError where there are none at all.
        """
        layers: dict[tuple[str, int], set[str | None]] = {}  # layer -> the parts that it has
        for name in linear_modules(model):
            place = layer_of(f"{name}.")
            if place is not None:
                layers.setdefault(place, set()).add(part_of(name))
        names, warnings, kind = part_names(model, *self.ends()), [], type(model).__name__
        if not names:
            raise RecipeError(
                f"tuner '{self.name}' does not know the modules of {kind}; name those that end its sublayers"
                " in target_modules"
            )
        for part in SUBLAYERS:
            without = sum(part not in parts for parts in layers.values())
            if without and part in self.ends():
                advice = "name the modules in target_modules"
                if part == "down" and any(layer_of(f"{module}.") for module, *_ in joined_weights(model)):
                    advice = (
                        "its experts are one tensor, on which none can sit; LoRA trains them with"
                        " target_parameters"
                    )
                warnings.append(
                    f"tuner '{self.name}' finds no matrix that ends {SUBLAYERS[part]} in {without} of the"
                    f" {len(layers)} layers of {kind} and puts no adapter there; {advice}"
                )
        return names, tuple(warnings)

    def widths(self, W: Tensor) -> tuple[int, int]:
        """Of h, and of the bottleneck."""
        width = W.shape[1 if self.parallel else 0]
        return width, max(1, round(width / self.reduction_factor))

    def init(self, W):
        return pair(*self.widths(W), W.shape[0])

    def maps(self, p) -> tuple[Tensor, Tensor]:
        """down [k, width] and up [out, k]."""
        return p.down, p.up

    def forward(self, x, y, p, layer):
        down, up = self.maps(p)
        return y + through(x if self.parallel else y, down, p.down_bias, up, p.up_bias, self.non_linearity)

    def weight(self, W: Tensor, p) -> Tensor:
        raise NotImplementedError(f"tuner '{self.name}' computes beside the weights and has no tuned weight")
