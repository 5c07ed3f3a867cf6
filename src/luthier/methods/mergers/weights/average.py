"""Model soup: the mean of each tensor over runs that started from one model. Inference costs one model.

Sums are in float64, so the average of equal tensors is that tensor bit for bit. For LoRA adapters, A and B
are averaged separately, which is the mean of their products only if one of the two is shared; full weights
have no such gap.
"""

from __future__ import annotations

import math

import torch

from luthier.errors import RecipeError
from luthier.methods.mergers._base import Merger
from luthier.methods.mergers.weights._layers import by_layer
from luthier.model.anatomy import layer_of
from luthier.registry import merger


@merger(
    paper="arXiv:2203.05482",
    row="model-soups",
    use_when="several runs started from one model and should become one model; plan `greedy_soup`"
    " chooses which.",
    costs="one pass over the tensors in float64; inference costs one model.",
    covers="the uniform soup, and one with a weight for each run, for all layers or layer by layer.",
    tests=[
        "methods/plans/merging/test_greedy_soup.py::test_a_soup_is_the_mean",
        "methods/plans/merging/test_greedy_soup.py::test_a_soup_of_heads_is_the_mean_of_logits",
        "methods/mergers/weights/test_average.py::test_merging_one_run_or_equal_runs_changes_nothing",
        "methods/mergers/weights/test_average.py::test_layers_have_weights_of_their_own",
    ],
)
class Average(Merger):
    """(sum of weight * tensor) / (sum of weights)."""

    weights: list[float] | None = None  # weight of each run, 0 or more; equal if not given
    # weights of the runs for each layer, counted from the input; `weights` are then for what is in no layer
    by_layer: list[list[float]] | None = None

    def __post_init__(self):
        for weights in [self.weights, *(self.by_layer or ())]:
            if weights is not None and not (
                weights and min(weights) >= 0 and 0 < math.fsum(weights) < math.inf
            ):
                raise ValueError("weights must not be negative, and not all 0")

    def tensor_by_tensor(self):
        return self.by_layer is None

    @torch.no_grad()
    def merge(self, several, base=None):
        names = self.alike(several)
        rest = self.weights or [1.0] * len(several)
        of_layer = {}
        if self.by_layer is not None:
            of_layer = by_layer(self.name, names, self.by_layer, f"by_layer has {len(self.by_layer)} lists")
        out = {}
        for name in names:
            weights = of_layer.get(layer_of(name), rest)
            if len(weights) != len(several):
                raise RecipeError(f"merger 'average' has {len(weights)} weights for {len(several)} runs")
            total = sum(t[name].double() * w for t, w in zip(several, weights, strict=True) if w)
            out[name] = (total / math.fsum(weights)).to(several[0][name].dtype)
        return out
