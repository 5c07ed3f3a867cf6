"""Elastic tuning (InstaTune): trains all weights so that smaller sub-networks, the first units of each layer,
work as well.

Before the first step the heads and feed-forward units of each layer are sorted by importance, the norm of a
unit's output on a few rows times the norm of the weights that read it; the network's output is unchanged.
Estimator `elastic` then trains the full network and sub-networks sampled at each step, evaluator `pareto`
searches for the best of them, and `sliced` turns one into a separate model. Departs from the paper: heads are
left out in groups that share keys and values, and layers only in pre-norm networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.pruned._elastic import COLUMNS, Anatomy, Shape, macs, masked, reorder, sliced
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.linear import linear_modules, oriented
from luthier.model.statistics import gather
from luthier.registry import Capability, tuner

ELASTIC = Capability("elastic", says="a tuner with sub-networks (`elastic`)")

Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]


@tuner(
    example={"init_rows": 2},
    paper="arXiv:2308.15609",
    row="instatune",
    provides=[MERGE, ELASTIC],
    use_when="one tuned model is to serve at several sizes: after training, smaller sub-networks are"
    " cut out of it without further training.",
    costs="as full fine-tuning, plus one more forward and backward pass for each sub-network that"
    " estimator `elastic` draws.",
    starting_rate="start with that of `full`.",
    covers="sub-networks of one tuned network, sorted by importance, and the search of their front.",
    omits="networks with several lists of layers (encoder-decoders, models with an image tower).",
    tests=[
        "methods/tuners/pruned/test_elastic.py::test_masked_is_sliced",
        "methods/tuners/pruned/test_elastic.py"
        "::test_half_the_width_is_better_after_elastic_tuning_and_the_best_parts_are_kept",
    ],
    default_rate=2e-5,
)
class Elastic(Tuner):
    """Full fine-tuning of a network with sub-networks."""

    heads: Shares = (0.5, 0.75, 1.0)  # shares of a layer's heads that a sub-network may have
    width: Shares = (0.25, 0.5, 0.75, 1.0)  # shares of a layer's feed-forward units
    depth: Shares = (1.0,)  # shares of the layers; layers are left out evenly over the depth
    init_rows: Annotated[int, Field(ge=1)] = 16  # rows on which importance is measured

    def attach(self, model):
        return ElasticModel(self, model)


class ElasticModel(TunedWeights):
    """All weights of a network, and its sub-networks."""

    def __init__(self, settings: Any, model: Any):
        super().__init__(settings, model, lambda name, p: p.is_floating_point())
        self.anatomy = Anatomy(model, settings.name)
        if min(settings.depth) < 1 and not self.anatomy.skips:
            raise RecipeError(
                "tuner 'elastic': this model applies its norms after each block (post-norm),"
                " so no layer can be left out; set depth: [1.0]"
            )

    # --- what there is to choose

    def units(self) -> tuple[list[int], list[int], list[int]]:
        """The numbers of head groups, feed-forward units and layers that a sub-network may have,
        ascending.
        """
        s, (groups, width) = self.settings, self.anatomy.whole[0]
        whole = ((s.heads, groups), (s.width, width), (s.depth, len(self.anatomy.layers)))
        heads, widths, depths = (
            sorted({max(1, round(share * n)) for share in shares}) for shares, n in whole
        )
        return heads, widths, depths

    def shape(self, choices: Sequence[tuple[int, int]], layers: int) -> Shape:
        """Units of each layer, and how many layers stay: those left out lie evenly between the first and the
        last.
        """
        n = len(self.anatomy.layers)
        dropped = {round((i + 1) * n / (n - layers + 1)) for i in range(n - layers)} if layers < n else set()
        dropped = {min(n - 1, g) for g in dropped}
        return tuple((0, 0) if i in dropped else tuple(c) for i, c in enumerate(choices))  # type: ignore[return-value]  # pairs stay pairs

    def draw(self, rng: torch.Generator) -> Shape:
        """A sub-network of chance, each layer by itself."""
        heads, widths, depths = self.units()

        def one(of: list[int]) -> int:
            return of[int(torch.randint(len(of), (), generator=rng))]

        return self.shape([(one(heads), one(widths)) for _ in self.anatomy.layers], one(depths))

    @property
    def smallest(self) -> Shape:
        heads, widths, depths = self.units()
        return self.shape([(heads[0], widths[0])] * len(self.anatomy.layers), depths[0])

    def playing(self, shape: Shape):
        """The network as a sub-network, for a while."""
        return masked(self.model, self.anatomy, shape)

    @contextmanager
    def whole(self):
        """Nothing left out, wherever it is asked: what a sub-network learns from."""
        hooks = [
            (m, m._forward_hooks, m._forward_pre_hooks)
            for layer in self.anatomy.layers
            for m in (self.model.get_submodule(layer[part]) for part in COLUMNS)
        ]
        for m, after, before in hooks:
            m._forward_hooks, m._forward_pre_hooks = type(after)(), type(before)()
        try:
            yield
        finally:
            for m, after, before in hooks:
                m._forward_hooks, m._forward_pre_hooks = after, before

    def macs(self, shape: Shape) -> int:
        """Multiplications with weights for each token."""
        return macs(self.model, self.anatomy, shape)

    def sliced(self, shape: Shape) -> Any:
        """A sub-network as a model of its own; `save_pretrained` wants one whose layers are alike."""
        return sliced(self.model, self.anatomy, shape)

    def export(self, shape: Shape, folder: Path | str) -> None:
        """A sub-network whose layers are alike, as a plain model on disk. Raises RecipeError for another."""
        if len({s for s in shape if s[0]}) > 1:
            raise RecipeError(
                "a plain model has layers of equal size, but those of this sub-network differ;"
                " use `sliced` in Python, or another shape"
            )
        self.sliced(shape).save_pretrained(folder)

    # --- the order of units

    @torch.no_grad()
    def initialize(self, rows, roles):
        modules = linear_modules(self.model)
        norms = gather("input_norms", modules, rows[: self.settings.init_rows], roles)
        for layer in self.anatomy.layers:
            for part, which in COLUMNS.items():
                W, norm = oriented(modules[layer[part]]), norms[layer[part]]
                units = self.anatomy.groups if which == 0 else self.anatomy.width
                worth = (norm * W.float().norm(dim=0)).square().view(units, -1).sum(1)
                order = worth.argsort(descending=True, stable=True)
                reorder(self.model, layer, which, order)
