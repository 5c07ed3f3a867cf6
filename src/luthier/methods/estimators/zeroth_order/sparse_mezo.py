"""Sparse MeZO: MeZO on the small weights of each tensor alone; large ones stay as they are.

Which weights are small is decided by a threshold for each tensor, set once from the weights that a run begins
with; the mask follows from it and from the current weights whenever it is needed and is never stored. A
weight that grows beyond its threshold stays where it is from then on. Departs: the threshold is that of a
tensor, not of a layer.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.estimators._base import FORWARD_ONLY
from luthier.methods.estimators.zeroth_order.mezo import MeZO
from luthier.registry import estimator


@estimator(
    paper="arXiv:2402.15751",
    row="sparse-mezo",
    provides=[FORWARD_ONLY],
    example={"sparsity": 0.1, "n_probes": 4},
    use_when="you would use `mezo` on all weights: fewer directions leave less noise, and larger learning"
    " rates stay stable.",
    costs="as `mezo`, and a mask of each tensor while it is displaced.",
    starting_rate="several times that of `mezo`.",
    covers="weights above their threshold stay bit for bit; with sparsity 0 it is `mezo`, bit for bit; one"
    " mask for both displacements and the step, from the weights as they are.",
    omits="a comparison with `mezo` at the paper's scale; masks computed within the forward pass.",
    tests=[
        "methods/estimators/zeroth_order/test_sparse_mezo.py::test_large_weights_stay_bit_for_bit",
        "methods/estimators/zeroth_order/test_sparse_mezo.py::test_without_sparsity_it_is_mezo",
        "methods/estimators/zeroth_order/test_sparse_mezo.py::test_it_is_the_finite_difference_along_masked_directions",
    ],
)
class SparseMeZO(MeZO):
    """MeZO whose directions are zero at large weights."""

    fixed_tensors = True  # thresholds are set once

    # share of the weights, the largest of each tensor, that stays as it is
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.75

    def chain_warnings(self, chain):
        sentences = super().chain_warnings(chain)
        if any(getattr(transform, "weight_decay", 0) for transform in chain):
            sentences.append(f"estimator '{self.name}': weight_decay moves the weights that are to stay, too")
        return sentences

    def step(self, closure, chain, clock):
        for group in chain.param_groups():
            thresholds = chain.state.setdefault(group.name, {}).setdefault("threshold", {})
            for slot, p in group.params.items():
                if p.requires_grad and slot not in thresholds:
                    thresholds[slot] = self.threshold(p)
        return super().step(closure, chain, clock)

    def threshold(self, p: torch.Tensor) -> torch.Tensor:
        """The size up to which weights of a tensor move."""
        if self.sparsity == 0 or not p.numel():  # however large weights become
            return torch.full((), torch.inf, device=p.device)
        count = max(1, round((1 - self.sparsity) * p.numel()))
        return p.detach().abs().float().flatten().kthvalue(count).values

    def masked(self, z, chain, group, slot, p):
        limit = chain.state[group]["threshold"][slot]
        return z.mul_(p.detach().abs().float() <= limit)
