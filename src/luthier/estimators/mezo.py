"""MeZO: the slope along random directions, from two forward passes each. No backward pass, no activations kept.

Departs: a direction follows from (seed, step, name) and is drawn anew wherever it is wanted, on the weights' own device,
so any chain may follow (the paper's is `optim: {name: sgd, max_grad_norm: 0}`; its constant schedule is
`lr_scheduler_type: constant`). The paper adds, subtracts and adds the probe in place, which leaves rounding behind at each
step (much of it in bfloat16) and a displaced model after an error. Here what moves is exchanged for a displaced copy: it
takes the memory of inference and one more copy of what moves, next to nothing for LoRA or a prompt.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.estimators._estimator import Estimator, displaced
from luthier.method import estimator
from luthier.transforms._chain import Lazily


@estimator(paper="arXiv:2305.17333", row="mezo")
class MeZO(Estimator):
    """g = (L(p + eps z) - L(p - eps z)) / (2 eps) * z, the mean over `n_probes` directions z."""

    eps: Annotated[float, Field(gt=0)] = 1e-3  # length of the probe
    n_probes: Annotated[int, Field(ge=1)] = 1  # directions per step; each costs two forward passes

    def step(self, closure, chain, clock):
        losses, slopes = [], []

        def at(probe: int, by: float) -> float:
            with displaced(chain, lambda site, slot, p: by * direction(clock, probe, site.name, slot, p)):
                losses.append(closure(grad=False))
            return losses[-1]

        for probe in range(self.n_probes):
            slopes.append((at(probe, self.eps) - at(probe, -self.eps)) / (2 * self.eps * self.n_probes))
        sites = {s.name: s for s in chain.sites()}

        def estimate(name: str) -> dict[str, Tensor]:
            moving = {k: p for k, p in sites[name].slots.items() if p.requires_grad}
            return {k: reduce(add, (g * direction(clock, i, name, k, p) for i, g in enumerate(slopes))) for k, p in moving.items()}

        chain.step(Lazily(sites, estimate))
        return sum(losses) / len(losses)


def direction(clock, probe: int, site: str, slot: str, like: Tensor) -> Tensor:
    """z of one tensor: standard normal, the same each time within a step."""
    rng = torch.Generator(like.device).manual_seed(clock.fold("mezo", probe, site, slot))
    return torch.randn(like.shape, generator=rng, device=like.device)
