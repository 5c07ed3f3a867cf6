"""Telly-K: freezes the embeddings and the K lowest layers; trains the layers above, the final norm and the
head.

Below the first trained layer no gradient is computed, so time and memory fall with K. The initial values of
the trained weights are stored, so disabling the tuner gives the base bit for bit. Departs from the paper: K
may be a fraction of the layers, and in an encoder-decoder it counts through the encoder's layers and then the
decoder's. Tied embeddings keep the head frozen with them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.anatomy import layer_of
from luthier.registry import tuner


@tuner(
    paper="arXiv:2304.05216",
    row="telly-k",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you have little memory and time and the task is close to pretraining: the lower layers"
    " stay frozen and no backward pass runs through them.",
    costs="falls with K: no gradients, optimizer state or kept activations below the first trained layer.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="the lowest layers frozen.",
    omits="the probing studies of the paper's first part.",
    tests=[
        "methods/tuners/subset/test_telly.py::test_telly",
    ],
)
class Telly(Tuner):
    """The top of the network. The paper's best trade-off is about K = 9 of 12 layers."""

    # number of frozen layers, counted from the input; below 1 a share of them; 0 freezes embeddings only
    k: Annotated[float, Field(ge=0)] = 0.75

    def attach(self, model):
        order = list(dict.fromkeys(place for n, _ in model.named_parameters() if (place := layer_of(n))))
        frozen = min(round(self.k * len(order)), len(order) - 1) if self.k < 1 else int(self.k)
        if frozen >= len(order):
            raise RecipeError(
                f"tuner 'telly': k: {self.k:g} leaves none of the {len(order)} layers of"
                f" {type(model).__name__} to train"
            )
        above = set(order[frozen:])
        # parameters are listed from input to output: what is in no layer goes with the layer before it
        last = None

        def moves(name: str, p) -> bool:
            nonlocal last
            last = layer_of(name) or last
            return last in above and p.is_floating_point()

        return TunedWeights(self, model, moves, keep_start=True)
