"""Inside and aside adapters: a bottleneck inside every layer, and beside the layers another one that is
chained to that of the layer before it.

Adapters inside of layers are separated by frozen ones, through which their gradients must go. The aside state
a_l = a_(l-1) + up f(down (h_l + a_(l-1))) goes from layer to layer without a frozen one between, and is added
to what each layer answers: h_l + a_l, or h_l + g a_l with a trained g. Departs: the paper's formula of the
fusion could not be looked up, so both forms are settings; the bottleneck inside sits after the feed-forward
block alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners._layerwise import Layerwise
from luthier.methods.tuners.adapters._bottleneck import NARROWER, Activation, pair, through
from luthier.registry import tuner


@tuner(
    example={"reduction_factor": 4},
    row="iaa-ir",
    provides=[DISABLE_ADAPTER],
    contract={"modules_of_every_kind": "an aside adapter is beside whole layers, at their last matrices"},
    use_when="adapters converge slowly or unsteadily in a deep network, as in dense retrieval: gradients"
    " reach the lowest ones without going through frozen layers.",
    costs="two bottlenecks a layer, in training and in inference (not mergeable).",
    starting_rate="start with that of `houlsby`.",
    default_rate=3e-4,
    covers="bottlenecks inside of layers and a chain of them beside the layers, added or gated.",
    omits="the adapter at attention; its study of retrieval and re-ranking on MS MARCO, and the count of"
    " steps to a loss.",
    tests=[
        "methods/tuners/adapters/test_iaa.py::test_without_aside_it_is_the_adapter_inside",
        "methods/tuners/adapters/test_iaa.py::test_the_chain_is_the_formula",
        "methods/tuners/adapters/test_iaa.py::test_the_lowest_layer_gets_more_gradient",
    ],
)
class IAA(Layerwise):
    """Adapters inside of layers, and a chain of adapters beside them."""

    # width divided by that of each bottleneck
    reduction_factor: Annotated[float, Field(ge=1), NARROWER] = 16
    non_linearity: Activation = "relu"  # nonlinearity f
    # how the aside state enters a layer's answer: added, or times a trained number that starts at 1
    fusion: Literal["add", "gate"] = "add"

    def init(self, W):
        width = W.shape[0]
        k = max(1, round(width / self.reduction_factor))
        tensors = {**pair(width, k, width), **pair(width, k, width, "aside_")}
        if self.fusion == "gate":
            tensors["aside_gate"] = torch.ones(1)
        return tensors

    def forward(self, x, y, p, layer):
        return y + through(y, p.down, p.down_bias, p.up, p.up_bias, self.non_linearity)

    def after_layer(self, entering, answer, carried, p):
        read = answer if carried is None else answer + carried
        aside = through(
            read, p.aside_down, p.aside_down_bias, p.aside_up, p.aside_up_bias, self.non_linearity
        )
        if carried is not None:
            aside = aside + carried
        return answer + (p.aside_gate * aside if self.fusion == "gate" else aside), aside
