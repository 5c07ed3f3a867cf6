"""LISA: embeddings, head and final norm always move; of the layers a few, drawn anew every so many steps.

The optimizer forgets a layer when it freezes, so its memory is that of what moves. Departs from LMFlow: a draw follows from
seed and step, so nothing about it needs saving. The start is not kept: it cannot be switched off.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from luthier.method import RecipeError, tuner
from luthier.tuners._subset import Weights
from luthier.tuners._tuner import Tuner

if TYPE_CHECKING:
    from luthier.architectures._network import Network


@tuner(paper="arXiv:2403.17919", row="lisa", gives="merge")
class LISA(Tuner):
    """Layerwise importance sampling."""

    n_layers: int = 2  # layers that move at once
    interval: int = 20  # optimizer steps between draws

    def __post_init__(self):
        if self.n_layers < 1 or self.interval < 1:
            raise RecipeError("n_layers and interval must be at least 1")

    def attach(self, model):
        return Draws(self, model)


class Draws(Weights):
    """All weights, of which some move now."""

    def __init__(self, settings: LISA, model: Network):
        super().__init__(settings, model, lambda name, p: p.is_floating_point())
        self.depth = model.config.get_text_config().num_hidden_layers
        stack = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == self.depth]
        if not stack:
            raise RecipeError(f"tuner 'lisa' finds no list of {self.depth} layers in {type(model).__name__}")
        inside = re.compile(rf"{re.escape(stack[0])}\.(\d+)\.")
        self.layer = {n: int(m[1]) for n in self.names if (m := inside.match(n))}  # parameter -> its layer
        self.move(range(min(settings.n_layers, self.depth)))  # until the first draw

    def move(self, live) -> None:
        """Let these layers move, and all that is in no layer."""
        live = set(live)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self.layer.get(name, -1) in live or name not in self.layer)
            if not p.requires_grad:
                p.grad = None

    def before_step(self, clock):
        draw = torch.randperm(self.depth, generator=clock.rng("lisa", at=clock.step // self.settings.interval))
        self.move(draw[: self.settings.n_layers].tolist())
