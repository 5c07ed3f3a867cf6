"""MeZO: the slope along random directions, from two forward passes each. No backward pass, no activations kept.

Departs: a direction follows from (seed, step, name) and is drawn anew wherever it is wanted, on the weights' own device,
so any chain may follow (the paper's is `optim: {name: sgd, max_grad_norm: 0}`; its constant schedule is
`lr_scheduler_type: constant`). The paper adds, subtracts and adds the probe in place, which leaves rounding behind at each
step (much of it in bfloat16) and a displaced model after an error. Here what moves is exchanged for a displaced copy: it
takes the memory of inference and one more copy of what moves, next to nothing for LoRA or a prompt. The second probe is the
mirror image of the first as it was rounded, so z is drawn twice a step, for the probe and for the update; on a CPU from a
table of 65,536 values, the largest 4.3, in two thirds of the time that torch takes. The two probes are not read side by side
in one pass: that could save at most a tenth from some 700 tokens a probe on (CPU, 5M and 26M parameters).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, reduce
from operator import add
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.estimators._estimator import Estimator, displaced
from luthier.method import estimator
from luthier.transforms._chain import Lazily

PIECE = 2**17  # numbers that follow from one seed
BLOCK = 2**15  # of them drawn at a time: what is made on the way stays in the cache


@estimator(paper="arXiv:2305.17333", row="mezo")
class MeZO(Estimator):
    """g = (L(p + eps z) - L(p - eps z)) / (2 eps) * z, the mean over `n_probes` directions z."""

    eps: Annotated[float, Field(gt=0)] = 1e-3  # length of the probe
    n_probes: Annotated[int, Field(ge=1)] = 1  # directions per step; each costs two forward passes
    noise: Literal["normal", "sign"] = "normal"  # of the directions; sign: +1 or -1 (as in SPSA), drawn in 3/5 of the time on a CPU

    def step(self, closure, chain, clock):
        losses, slopes = [], []
        for probe in range(self.n_probes):

            def aside(site, slot, p, probe=probe):
                return direction(clock, probe, site.name, slot, p, self.noise, self.eps)

            with displaced(chain, aside) as mirror:
                losses.append(closure(grad=False))
                mirror()
                losses.append(closure(grad=False))
            slopes.append((losses[-2] - losses[-1]) / (2 * self.eps * self.n_probes))
        sites = {s.name: s for s in chain.sites()}

        def estimate(name: str) -> dict[str, Tensor]:
            moving = {k: p for k, p in sites[name].slots.items() if p.requires_grad}
            return {
                k: reduce(add, (direction(clock, i, name, k, p, self.noise, g) for i, g in enumerate(slopes))) for k, p in moving.items()
            }

        chain.step(Lazily(sites, estimate))
        return sum(losses) / len(losses)


def direction(clock, probe: int, site: str, slot: str, like: Tensor, noise: str = "normal", scale: float = 1.0) -> Tensor:
    """scale * z of one tensor; z has mean 0 and variance 1, and is the same each time within a step. A CPU draws its pieces side by side."""
    on_cpu = like.device.type == "cpu"
    z = torch.empty(like.shape, device=like.device)
    pieces = z.view(-1).split(PIECE) if on_cpu else (z.view(-1),)

    def fill(k: int) -> None:
        names = (probe, site, slot, k) if k else (probe, site, slot)
        rng = torch.Generator(like.device).manual_seed(clock.fold("mezo", *names))
        if noise == "normal" and not on_cpu:
            pieces[k].normal_(generator=rng).mul_(scale)
            return
        for part in pieces[k].split(BLOCK) if on_cpu else pieces:
            looked_up(part, noise, rng).mul_(scale)

    if len(pieces) > 1 and torch.get_num_threads() > 1:
        list(_threads(torch.get_num_threads()).map(fill, range(len(pieces))))
    else:
        for k in range(len(pieces)):
            fill(k)
    return z


_threads = lru_cache(maxsize=1)(ThreadPoolExecutor)  # begun once: a step draws for hundreds of tensors


def looked_up(out: Tensor, noise: str, rng: torch.Generator) -> Tensor:
    """Fill out [n] with noise: 16 random bits are one of 65,536 values of a normal number, 8 are as many signs."""
    table = _table(noise, out.device)
    code, each = (torch.uint16, 1) if noise == "normal" else (torch.uint8, 8)
    count = -(-len(out) // each)
    drawn = torch.empty(-(-count * code.itemsize // 8), dtype=torch.int64, device=out.device).random_(-(2**63), None, generator=rng)
    codes = drawn.view(code)[:count].int()
    if each == 1:
        return torch.index_select(table, 0, codes, out=out)
    return out.copy_(table.index_select(0, codes).view(-1)[: len(out)])


@lru_cache(maxsize=8)
def _table(noise: str, device: torch.device) -> Tensor:
    """normal: [65536] the middles of as many slices of equal probability, scaled to variance 1. sign: [256, 8] the bits of each byte."""
    if noise == "normal":
        middle = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
        z = torch.special.ndtri(middle)
        return (z / z.square().mean().sqrt()).float().to(device)
    return (((torch.arange(256)[:, None] >> torch.arange(8)) & 1) * 2.0 - 1).to(device)
