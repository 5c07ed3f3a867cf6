"""Trains one part of the network: its token embeddings and output layer, its last layer (of the decoder, in
an encoder-decoder), or its output alone (a linear probe).

Two ways of specialising a model to one project, between full fine-tuning and a prefix: L-EO and L-LDB. The
initial values of the trained weights are stored, so disabling the tuner gives the base bit for bit.
"""

from __future__ import annotations

from typing import Literal

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights, head_of
from luthier.model.anatomy import layer_of
from luthier.registry import tuner


@tuner(
    row="personalized-unit-test-models",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you specialise one model for many projects and want the plainest partial tuning as a"
    " comparison: the embeddings and output layer, or the last layer.",
    costs="gradients and optimizer state of that part; `last_layer` needs no backward pass below it.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="embeddings and output, or the last layer, alone.",
    tests=[
        "methods/tuners/subset/test_part.py::test_part_moves_exactly_what_it_names",
    ],
)
class Part(Tuner):
    """Embeddings and output, the last layer, or the output alone."""

    # what is trained; tied embeddings and output are one tensor. head: the output alone, a linear probe
    part: Literal["embeddings", "last_layer", "head"] = "last_layer"

    def attach(self, model):
        if self.part == "embeddings":
            ends = [model.get_input_embeddings(), model.get_output_embeddings()]
            mine = {id(p) for m in ends if m is not None for p in m.parameters()}
            return TunedWeights(self, model, lambda name, p: id(p) in mine, keep_start=True)
        if self.part == "head":
            mine = {id(p) for m in head_of(model, "part") for p in m.parameters(recurse=False)}
            return TunedWeights(self, model, lambda name, p: id(p) in mine, keep_start=True)
        order = list(dict.fromkeys(place for n, _ in model.named_parameters() if (place := layer_of(n))))
        if not order:
            raise RecipeError(f"tuner 'part' finds no list of layers in {type(model).__name__}")
        return TunedWeights(self, model, lambda name, p: layer_of(name) == order[-1], keep_start=True)
