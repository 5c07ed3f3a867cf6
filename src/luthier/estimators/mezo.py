"""MeZO: the slope along random directions, from two forward passes each. No backward pass, no activations kept.

Departs: a direction follows from (seed, step, name) and is drawn anew wherever it is wanted, on the weights' own device,
so any chain may follow (the paper's is `optim: {name: sgd, max_grad_norm: 0}`; its constant schedule is
`lr_scheduler_type: constant`). The paper adds, subtracts and adds the probe in place, which leaves rounding behind at each
step (much of it in bfloat16) and a displaced model after an error. Here what moves is exchanged for a displaced copy: it
takes the memory of inference and one more copy of what moves, next to nothing for LoRA or a prompt. The second probe is the
mirror image of the first as it was rounded, so z is drawn twice a step, for the probe and for the update. The two are not
read side by side in one pass: that could save at most a tenth from some 700 tokens a probe on (CPU, 5M and 26M parameters).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.estimators._estimator import Estimator, displaced
from luthier.method import estimator
from luthier.transforms._chain import Lazily

PIECE = 2**20  # numbers drawn in one go


@estimator(paper="arXiv:2305.17333", row="mezo")
class MeZO(Estimator):
    """g = (L(p + eps z) - L(p - eps z)) / (2 eps) * z, the mean over `n_probes` directions z."""

    eps: Annotated[float, Field(gt=0)] = 1e-3  # length of the probe
    n_probes: Annotated[int, Field(ge=1)] = 1  # directions per step; each costs two forward passes
    noise: Literal["normal", "sign"] = "normal"  # of the directions; sign: +1 or -1 (as in SPSA), drawn in less than half the time on a CPU

    def step(self, closure, chain, clock):
        losses, slopes = [], []
        for probe in range(self.n_probes):

            def aside(site, slot, p, probe=probe):
                return direction(clock, probe, site.name, slot, p, self.noise).mul_(self.eps)

            with displaced(chain, aside) as mirror:
                losses.append(closure(grad=False))
                mirror()
                losses.append(closure(grad=False))
            slopes.append((losses[-2] - losses[-1]) / (2 * self.eps * self.n_probes))
        sites = {s.name: s for s in chain.sites()}

        def estimate(name: str) -> dict[str, Tensor]:
            moving = {k: p for k, p in sites[name].slots.items() if p.requires_grad}
            return {
                k: reduce(add, (direction(clock, i, name, k, p, self.noise).mul_(g) for i, g in enumerate(slopes)))
                for k, p in moving.items()
            }

        chain.step(Lazily(sites, estimate))
        return sum(losses) / len(losses)


def direction(clock, probe: int, site: str, slot: str, like: Tensor, noise: str = "normal") -> Tensor:
    """z of one tensor, mean 0 and variance 1, the same each time within a step. On a CPU its pieces are drawn side by side."""
    z = torch.empty(like.shape, device=like.device)
    pieces = z.view(-1).split(PIECE) if like.device.type == "cpu" else (z.view(-1),)

    def fill(k: int) -> None:
        names = (probe, site, slot, k) if k else (probe, site, slot)
        rng = torch.Generator(like.device).manual_seed(clock.fold("mezo", *names))
        pieces[k].normal_(generator=rng) if noise == "normal" else pieces[k].copy_(signs(pieces[k], rng))

    if len(pieces) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(fill, range(len(pieces))))
    else:
        for k in range(len(pieces)):
            fill(k)
    return z


def signs(like: Tensor, rng: torch.Generator) -> Tensor:
    """[n] of +1 and -1, eight out of each random byte."""
    count, device = -(-len(like) // 8), like.device
    drawn = torch.empty(-(-count // 4), dtype=torch.int32, device=device).random_(-(2**31), 2**31, generator=rng).view(torch.uint8)
    byte = torch.arange(256, device=device)
    table = (((byte[:, None] >> torch.arange(8, device=device)) & 1) * 2 - 1).to(like.dtype)
    return table[drawn[:count].int()].view(-1)[: len(like)]
