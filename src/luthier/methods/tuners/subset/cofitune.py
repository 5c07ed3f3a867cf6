"""CoFiTune: trains a few matrices of some layers, and scales down the gradient of the rows that general
skills depend on.

Coarse: the feed-forward up and down matrices of the second quarter of each list of layers, unless set (plan
'cofitune' searches). Fine: the importance I of a row is |d KL / d gate| of a gate of 1 on its output, between
two passes over the rows with different dropout, averaged over rows before the absolute value; per layer it is
standardised and mapped to [0, 1) by |tanh|. The row's gradient is multiplied by 1 - I. The initial values of
the trained matrices are stored: disabling the tuner gives the base. Departs from the paper: luthier adds the
dropout of those two passes, on the gated neurons, since current models have none. Heads are not masked (nor
are they by default in the reference). Note that Adam's step does not depend on a gradient's scale, so with
Adam only an I near 1 has an effect; with sgd or lion's momentum, or where rows differ within a clipped
gradient, all of it has.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.anatomy import layer_of, part_of
from luthier.model.linear import linear_modules
from luthier.registry import tuner

PARTS = {
    "qkv": {"q", "k", "v", "qkv"},
    "o": {"o"},
    "up": {"up", "gate_up"},
    "gate": {"gate", "gate_up"},
    "down": {"down"},
}
Part = Literal["qkv", "o", "up", "gate", "down"]
Edge = Annotated[float, Field(ge=0, le=1)]


@tuner(
    example={"init_rows": 2},
    paper="arXiv:2404.10306",
    row="cofitune",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you tune a specialist and must keep general skills: it trains a few matrices of some"
    " layers and slows the rows that general skills depend on.",
    costs="gradients and optimizer state of the chosen matrices, and two passes over `init_rows` rows"
    " before the first step.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="a range of layers, and the soft mask of its important units.",
    omits="a mask that Adam's rescaling leaves alone: it counters a soft mask; heads are not masked.",
    tests=[
        "methods/tuners/subset/test_cofitune.py::test_cofitune_moves_the_second_quarter",
        "methods/tuners/subset/test_cofitune.py::test_cofitune_soft_mask",
        "methods/tuners/subset/test_cofitune.py::test_cofitune_importance",
    ],
)
class CoFiTune(Tuner):
    """Coarse-to-fine selection of weights."""

    layer_range: tuple[Edge, Edge] = (0.25, 0.5)  # first and last trained layer, as shares of the depth
    modules: tuple[Part, ...] = ("up", "down")  # the matrices that are trained
    soft_mask: bool = True  # whether rows that general skills depend on get a smaller gradient
    noise: Annotated[float, Field(gt=0, lt=1)] = 0.1  # dropout of the passes that measure importance
    init_rows: Annotated[int, Field(ge=1)] = 64  # rows on which importance is measured

    def attach(self, model):
        return SoftMaskedWeights(self, model)


class SoftMaskedWeights(TunedWeights):
    """Some matrices, each with a factor per output row for its gradient."""

    def __init__(self, settings, model):
        names = [n for n, _ in model.named_parameters()]
        places = list(dict.fromkeys(place for n in names if (place := layer_of(n))))
        low, high = settings.layer_range
        if not places:
            raise RecipeError(f"tuner 'cofitune' finds no list of layers in {type(model).__name__}")
        within: set[tuple[str, int]] = set()
        for stack in dict.fromkeys(where for where, _ in places):  # of encoder and decoder each its own share
            own = [place for place in places if place[0] == stack]
            first = min(int(low * len(own)), len(own) - 1)
            within.update(own[first : max(first + 1, math.ceil(high * len(own)))])
        parts = set().union(*(PARTS[m] for m in settings.modules))

        def moves(name: str, p) -> bool:
            return layer_of(name) in within and part_of(module_of(name)) in parts

        super().__init__(settings, model, moves, keep_start=True)
        self.keep: dict[str, Tensor] = {}
        linear = linear_modules(model)
        for name in self.names if settings.soft_mask else ():
            module, p = linear.get(module_of(name)), model.get_parameter(name)
            if module is not None and part_of(module_of(name)) in ("up", "down"):
                sideways = p.ndim == 2 and type(module).__name__ == "Conv1D"
                self.keep[name] = keep = torch.ones(p.shape[1] if sideways else p.shape[0], device=p.device)
                shape = (-1,) if p.ndim == 1 or sideways else (-1, 1)
                p.register_hook(lambda g, keep=keep, shape=shape: g * keep.view(shape).to(g.dtype))

    def memory(self):
        return {f"{n}.keep": k for n, k in self.keep.items()}

    def initialize(self, rows, roles):
        if not self.keep:
            return
        importance = self.importance(rows[: self.settings.init_rows], roles)
        for name, keep in self.keep.items():
            inner, outer = importance[layer_of(name)]
            keep.copy_(1 - normalised(inner if part_of(module_of(name)) == "up" else outer))

    def importance(self, rows: list[dict], roles) -> dict:
        """layer -> ([neurons], [width]): the mean gradient of the KL with respect to gates on a layer's
        neurons and outputs.
        """
        downs = {
            n: m
            for n, m in linear_modules(self.model).items()
            if part_of(n) == "down" and layer_of(f"{n}.") in set(map(layer_of, self.keep))
        }
        gates, hooks, turn = {}, [], [0]

        def noisy(x: Tensor, name: str) -> Tensor:
            keep = (
                torch.rand(x.shape, generator=roles.clock.rng("cofitune", name, turn[0], at=0))
                > self.settings.noise
            )
            return x * keep.to(x) / (1 - self.settings.noise)

        for name, module in downs.items():
            n_out, n_in = (
                s for s in (module.weight.T if type(module).__name__ == "Conv1D" else module.weight).shape
            )
            like = dict(device=module.weight.device, dtype=module.weight.dtype, requires_grad=True)
            gates[layer_of(f"{name}.")] = inner, outer = torch.ones(n_in, **like), torch.ones(n_out, **like)
            hooks.append(
                module.register_forward_pre_hook(lambda m, x, g=inner, n=name: (noisy(x[0], n) * g,))
            )
            hooks.append(module.register_forward_hook(lambda m, x, y, g=outer: y * g))
        moving = [p for p in self.model.parameters() if p.requires_grad]
        for p in moving:
            p.requires_grad_(False)
        try:
            with torch.enable_grad():
                for row in rows:
                    batch, passes = roles.batch([row]), []
                    for _ in range(2):
                        passes.append(roles.policy(batch))
                        turn[0] += 1
                    one, two = passes
                    kl = one.apply(
                        lambda a, b: divergence(a.log_softmax(-1), b.log_softmax(-1)), beside=[two]
                    )
                    if kl.requires_grad:  # else the row reads none of these layers (an image tower's)
                        (kl.mean() / len(rows)).backward()
        finally:
            for h in hooks:
                h.remove()
            for p in moving:
                p.requires_grad_(True)
        return {
            place: tuple(torch.zeros_like(g) if g.grad is None else g.grad.float() for g in pair)
            for place, pair in gates.items()
        }


def normalised(gradient: Tensor) -> Tensor:
    """[n] -> [n] in [0, 1): how far each stands from the layer's mean, squashed."""
    spread = gradient.std().clamp(min=1e-30)
    return ((gradient - gradient.mean()) / spread).tanh().abs()


def module_of(parameter: str) -> str:
    return parameter.removesuffix(".weight").removesuffix(".bias")
