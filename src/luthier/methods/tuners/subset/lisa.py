"""LISA: always trains embeddings, output head and final norm, and a few layers that are drawn anew every
`interval` steps.

The optimizer state of a layer is dropped when the layer is frozen, so memory is that of the trained layers.
Departs from LMFlow: a draw depends on seed and step only, so nothing about it is saved. The initial weights
are not stored, so the tuner cannot be disabled.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from luthier.errors import RecipeError
from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import LayerwiseWeights
from luthier.registry import tuner


@tuner(
    example={"n_layers": 1},
    paper="arXiv:2403.17919",
    row="lisa",
    provides=[MERGE],
    use_when="memory is too small for full fine-tuning and LoRA learns too little: it trains all"
    " weights of a few layers at a time.",
    costs="optimizer state of embeddings, head and `n_layers` layers; activations as in full fine-tuning.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="layers drawn anew, evenly, and optimizer state of those that move.",
    tests=[
        "methods/tuners/subset/test_lisa.py::test_lisa_moves_what_it_says",
        "methods/tuners/subset/test_lisa.py::test_lisa_draws_evenly_and_forgets_nothing_when_all_move",
        "methods/tuners/subset/test_lisa.py::test_lisa_keeps_state_of_what_moves_only",
    ],
)
class LISA(Tuner):
    """Layerwise importance sampling."""

    changes_phase: ClassVar[bool] = True

    n_layers: int = 2  # number of layers trained at once
    interval: int = 20  # optimizer steps between draws

    def __post_init__(self):
        if self.n_layers < 1 or self.interval < 1:
            raise RecipeError("n_layers and interval must be at least 1")

    def attach(self, model):
        return SampledLayers(self, model)


class SampledLayers(LayerwiseWeights):
    """A few layers at a time, all equally likely."""

    def __init__(self, settings, model):
        super().__init__(settings, model)
        self.move(range(min(settings.n_layers, self.depth)))  # until the first draw

    def on_phase(self, clock):
        draw = clock.rng(self.settings.name, at=clock.step // self.settings.interval)
        self.move(self.drawn(draw))
        return {}

    def drawn(self, rng: torch.Generator) -> list[int]:
        """The layers of one draw."""
        return torch.randperm(self.depth, generator=rng)[: self.settings.n_layers].tolist()
