"""Intrinsic dimension: trains only d parameters, which a fixed random map turns into a change of all chosen
weights.

W_i' = W_i + lambda_i P_i(theta), with one learned lambda per module (structure-aware, SAID: they count as
part of d) or none (DID). P_i is Fastfood: blocks of H G Pi H B with Hadamard matrices H, signs B, a
permutation Pi and Gaussians G, regenerated from `seed` and the module's name whenever needed, so nothing of
the model's size must be stored; up to `cache_gb` of what was drawn is. The d at which 90 % of full
fine-tuning's metric is reached (d90) is the task's intrinsic dimension: plan `intrinsic_dimension` searches
for it.

Departs: the map is drawn for each module, and scaled so that |P_i(theta)|^2 = |theta|^2 times the module's
share of all parameters on average; a Hadamard block longer than a module is cut off. With theta at zero,
lambda gets no gradient at the first step; it starts at one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch.utils.checkpoint import checkpoint

from luthier.clock import Clock
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.low_rank.intrinsic_dimension.fastfood import project
from luthier.registry import INTERNAL, tuner


@tuner(
    paper="arXiv:2012.13255",
    row="intrinsic-dimension",
    provides=[DISABLE_ADAPTER, MERGE],
    former_settings={"said": "structure_aware"},
    use_when="you ask how many free parameters a task really takes; plan `intrinsic_dimension`"
    " searches that number.",
    costs="`d` trainable numbers, and 9 bytes for each chosen weight whose random map is cached; the others"
    " are drawn twice a step: slower than LoRA.",
    starting_rate="far above other tuners': plan `intrinsic_dimension` tries 0.03, 0.1 and 0.3.",
    default_rate=3e-2,
    covers="Fastfood as its dense matrix, lengths kept on average, d numbers with or without scales; "
    "nothing of the network's size is kept but the maps that `cache_gb` allows.",
    omits="one projection over all weights at once (DID is drawn module by module); embeddings and norms.",
    tests=[
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_fastfood_is_its_dense_matrix",
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_intrinsic_dimension_moves_d_numbers",
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_maps_are_drawn_once",
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_nothing_of_the_size_of_the_network_is_kept_for_the_backward_pass",
    ],
)
class IntrinsicDimension(Delta):
    """d trainable parameters for a whole network."""

    d: Annotated[int, Field(ge=1)] = 1000  # trainable parameters, scales of modules included
    structure_aware: bool = True  # a separate scale for each module
    seed: int = 0  # random seed of the map; an adapter is loaded with the seed it was trained with
    # gigabytes of random maps that are kept for later passes; 0: they are drawn again each time
    cache_gb: Annotated[float, Field(ge=0)] = 1.0
    # how many modules share the d numbers; filled in when it is attached
    modules: Annotated[int, INTERNAL] = 0
    # how many numbers these modules hold; filled in when it is attached
    numbers: Annotated[int, INTERNAL] = 0
    module: Annotated[str, INTERNAL] = ""  # the module whose map this is; filled in for each

    maps = None  # what was drawn for a network's modules

    def at(self, name):
        own = replace(self, module=name)
        object.__setattr__(own, "maps", self.maps)
        return own

    def attach(self, model):
        from luthier.methods.tuners.low_rank.intrinsic_dimension.tuned import IntrinsicDimensionModel

        return IntrinsicDimensionModel(self, model)

    @property
    def length(self):
        """How many numbers the shared vector has."""
        return self.d - self.modules * self.structure_aware

    def init(self, W):
        scale = {"scale": torch.ones(1)} if self.structure_aware else {}
        return {"theta": torch.zeros(self.length), **scale}

    def delta(self, p, shape):
        """[out, in] what is added."""
        n = shape[0] * shape[1]
        seed = Clock(self.seed).derive_seed(self.module, at=0)
        step = project(p.theta, n, seed, self.maps).view(*shape) * (n / (self.numbers or n)) ** 0.5
        return step * p.scale if self.structure_aware else step

    def weight(self, W, p):
        return W + self.delta(p, W.shape).to(W.dtype)

    def forward(self, x, y, p, layer):
        # in backward the change is made anew: kept, it would weigh as much as the network
        return checkpoint(self.added, x, y, p, use_reentrant=False)

    def added(self, x, y, p):
        """The output with what the change adds to it."""
        return y + x @ self.delta(p, (y.shape[-1], x.shape[-1])).T
