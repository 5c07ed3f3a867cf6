"""MoSA: an adapter whose weights are split into parts that do not overlap; each training pass uses one part,
drawn anew, and afterwards all parts together are one ordinary adapter.

Random masks split `up`, and with `split: both` also `down`, into `parts` of as many numbers each. A pass in
training takes one part, and its gradient reaches that part alone; with `split: up`, the paper's hierarchical
form, `down` is used whole and the gradient of one drawn part of it counts. Evaluation and everything after
training use the sum of the parts, so nothing is merged and nothing costs more. The consistency of two passes
is objective `r_drop` with `likelihood: first`.

Departs: the draws are those of dropout, for each layer and micro-batch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners._delta import frozen
from luthier.methods.tuners.adapters._bottleneck import through
from luthier.methods.tuners.adapters._sublayer import SublayerAdapter
from luthier.registry import Range, tuner


@tuner(
    row="mosa",
    provides=[DISABLE_ADAPTER],
    use_when="adapters overfit few rows: each step trains a drawn part of their weights, and inference costs"
    " what a plain adapter costs.",
    costs="as a parallel adapter.",
    starting_rate="the paper takes 1e-3.",
    default_rate=1e-3,
    covers="disjoint parts that cover every number, drawn for each layer and pass; hierarchical and full"
    " splits, over parallel and sequential adapters; the consistency of two passes is objective `r_drop`.",
    omits="its image data sets.",
    tests=[
        "methods/tuners/adapters/test_mosa.py::test_parts_are_disjoint_and_their_sum_is_the_adapter",
        "methods/tuners/adapters/test_mosa.py::test_gradients_stay_in_the_part_that_was_drawn",
        "methods/tuners/adapters/test_mosa.py::test_one_part_trains_as_the_plain_adapter",
        "methods/objectives/supervised/test_r_drop.py"
        "::test_it_is_the_likelihoods_and_the_divergence_of_two_passes",
    ],
)
class MoSA(SublayerAdapter):
    """A mixture of sparse adapters at sublayers."""

    parts: Annotated[int, Field(ge=1), Range(1, 8)] = 4  # parts of the weights, of which a pass trains one
    split: Literal["up", "both"] = "up"  # weights that are split; of the others only the gradient is
    scaling: Annotated[float, Field(gt=0)] = 1.0  # what the change is multiplied by

    def init(self, W):
        tensors: dict[str, Any] = super().init(W)
        if self.parts == 1:
            return tensors
        for name in ("down", "up"):
            size = tensors[name].shape
            order = torch.randperm(size.numel()) % self.parts
            tensors[f"{name}_part"] = frozen(order.reshape(size).to(torch.uint8))
        return tensors

    def change(self, h, p, training):
        down, up = p.down, p.up
        if training and self.parts > 1:
            draws = torch.randint(self.parts, (2,)).tolist()
            up = up * (p.up_part == draws[1])
            chosen = p.down_part == draws[0]
            down = down * chosen if self.split == "both" else gradient_of(down, chosen)
        return self.scaling * through(h, down, p.down_bias, up, p.up_bias, self.non_linearity)


def gradient_of(weight: Tensor, chosen: Tensor) -> Tensor:
    """The same weight, whose gradient reaches the chosen entries alone."""
    return torch.where(chosen, weight, weight.detach())
