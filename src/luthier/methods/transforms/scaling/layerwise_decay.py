"""Layer-wise learning rates: the top layer has the full rate, and each layer below `decay` times that of the
one above it (as in ELECTRA).

A layer is identified by its number in a list of layers, among all parameters that the tuner may train.
Parameters outside the layers follow the end of the network they belong to: embeddings below the first layer,
heads and final norms at the top. Place it after the transforms that rescale (adam), which would undo it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from luthier.methods.transforms._base import Transform
from luthier.registry import Range, transform

LAYER = re.compile(r"\b(?:layers?|h|blocks?)\.(\d+)\b")
BELOW = re.compile(r"embed|\bwte\b|\bwpe\b|\bshared\b")


@transform(
    paper="doi:10.1016/j.patter.2023.100729",
    row="stable-ft-biomedical",
    use_when="you fine-tune a pretrained encoder on few rows and lower layers should change less.",
    costs="nothing.",
    starting_rate="that of `full`, for the top layer.",
    covers="the learning rate of each layer.",
    tests=[
        "methods/transforms/test_layerwise_decay.py::test_layerwise_rates_are_the_formula",
    ],
)
class LayerwiseDecay(Transform):
    """update * decay^(layers above)."""

    # a layer's rate divided by that of the layer above it
    decay: Annotated[float, Field(gt=0, le=1), Range(0.7, 0.98)] = 0.9
    # number of layers; 0: counted from the names of the trainable parameters
    layers: Annotated[int, Field(ge=0)] = 0

    def bind(self, attached):
        numbers = [int(m[1]) + 1 for group in attached.all_param_groups() if (m := LAYER.search(group.name))]
        return self if self.layers else replace(self, layers=max(numbers, default=0))

    def apply(self, grads, state, group, step):
        match = LAYER.search(group.name)
        above = self.layers - 1 - int(match[1]) if match else self.layers if BELOW.search(group.name) else 0
        return {slot: grad * self.decay ** max(0, above) for slot, grad in grads.items()}
