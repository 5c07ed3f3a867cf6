"""MeZO: estimates the gradient along random directions from two forward passes each. No backward pass and no
stored activations.

Departs: a direction is determined by (seed, step, name) and regenerated on the weights' own device whenever
it is needed, so any optimizer chain can follow (the paper's is `optim: {name: sgd, max_grad_norm: 0}`; its
constant schedule is `lr_scheduler_type: constant`). The paper adds and subtracts the perturbation in place,
which accumulates rounding errors (large ones in bfloat16) and leaves perturbed weights after an exception.
Here they are swapped for perturbed ones and never written to, so that they come back bit for bit: under LoRA
or a prompt all at once, for one more copy of them; where more moves (full tuning) layer by layer, each
layer's while it computes. Memory is then that of inference, one layer, and what lies outside of layers
(embeddings and head), with the weights in fp32; weights of low precision also have fp32 masters in the
optimizer. The second perturbation is the exact mirror of the first as rounded, so z is drawn twice per step,
for the perturbation and for the update; layer by layer once for each pass and for the update. On a CPU, four
numbers at a time come from a table of 65,536 quadruples, in a quarter of torch's time; each number takes one
of 65,536 equally likely values, the largest 4.3, and the four of a quadruple are uncorrelated. Half-precision
weights are perturbed by z rounded to their dtype; the update uses z in fp32. The two forward passes are not
combined into one: that would save at most a tenth, from about 700 tokens per pass on (CPU, 5M and 26M
parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, reduce
from operator import add
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.clock import Clock
from luthier.methods.estimators._base import FORWARD_ONLY, Closure, Estimator
from luthier.methods.estimators.zeroth_order._by_layer import Aside, perturbed_by_layer, places
from luthier.methods.transforms._base import LazyGradients
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import estimator

if TYPE_CHECKING:
    from luthier.train.optimizer import Chain

PIECE = 2**17  # numbers that follow from one seed; on a CPU what is made on the way stays in the cache


@estimator(
    paper="arXiv:2305.17333",
    row="mezo",
    provides=[FORWARD_ONLY],
    use_when="memory suffices for inference but not for training, or the metric has no gradient worth"
    " following. It needs many more steps than backprop.",
    costs="two forward passes for each of `n_probes` directions, no backward pass and no kept"
    " activations; memory of inference plus a copy of the trainable parameters, under full tuning of one"
    " layer and of what is outside of layers.",
    starting_rate="with `sgd` far smaller than Adam's rates: the paper takes 1e-7 to 1e-6 for all"
    " weights of OPT-13B.",
    covers="the estimate is the finite difference along its directions; its mean over 5000 directions "
    "points along the gradient (cosine > 0.95); a run is replayed bit for bit from its losses; no"
    " backward pass; parameters are back where they were, bit for bit; accuracy and F1 rise on a"
    " separable task.",
    omits="directions scaled by each tensor's norm or variance; Adam by replaying the history (any "
    "optimizer may follow, with its state); prefixes that start from real activations; a "
    "checkpoint of seeds alone.",
    tests=[
        "methods/estimators/zeroth_order/test_mezo.py::test_mezo_is_the_finite_difference_along_its_directions",
        "methods/estimators/zeroth_order/test_mezo.py::test_mezo_points_along_the_gradient_on_average",
        "methods/estimators/zeroth_order/test_mezo.py::test_mezo_is_replayed_from_its_losses_alone",
        "methods/estimators/zeroth_order/test_mezo.py::test_mezo_solves_a_quadratic_without_a_single_backward_pass",
        "methods/estimators/zeroth_order/test_mezo.py::test_mezo_raises_a_metric",
    ],
)
class MeZO(Estimator):
    """g = (L(p + eps z) - L(p - eps z)) / (2 eps) * z, the mean over `n_probes` directions z."""

    # what the norm of the estimate is, where a clip at the usual gradient norm would eat it; "" where not
    norm: ClassVar[str] = "that of the gradient times the square root of the number of trainable parameters"

    eps: Annotated[float, Field(gt=0)] = 1e-3  # scale of the perturbation
    n_probes: Annotated[int, Field(ge=1)] = 1  # directions per step; each costs two forward passes
    noise: Literal["normal", "sign"] = "normal"  # distribution of the directions; sign: +1 or -1 (as in SPSA)

    def chain_warnings(self, chain):
        if not self.norm or any(getattr(transform, "rescales", False) for transform in chain):
            return []  # whatever follows brings the step to its own size
        for transform in chain:
            if getattr(transform, "max_grad_norm", 0):
                return [
                    f"estimator '{self.name}': the norm of its estimate is {self.norm}; max_grad_norm"
                    f" {transform.max_grad_norm:g} clips nearly all of it, so set it to 0"
                ]
        return []

    def displaced_bytes(self, chain):
        return places(chain).displaced_bytes()

    def step(self, closure, chain, clock):
        losses, slopes = [], []
        for probe in range(self.n_probes):
            losses += self.sides(lambda: closure(grad=False), chain, clock, probe)
            slopes.append(self.slope(*losses[-2:]) / self.n_probes)
        self.step_along(self.chosen(slopes, closure, chain, clock), chain, clock)
        return sum(losses) / len(losses)

    def sides(self, loss: Callable[[], float], chain: Chain, clock: Clock, probe: int) -> tuple[float, float]:
        """The loss at p + eps z and at p - eps z, of direction number `probe`."""
        with perturbed_by_layer(chain, self.aside(chain, clock, probe)) as flip:
            above = loss()
            flip()
            return above, loss()

    def aside(self, chain: Chain, clock: Clock, probe: int) -> Aside:
        """(group, slot, p) -> eps z of that tensor, of direction number `probe`."""

        def displacement(group: ParamGroup, slot: str, p: Tensor) -> Tensor:
            dtype = p.dtype if p.dtype in WIDE else torch.float32
            z = direction(clock, probe, group.name, slot, p, self.noise, self.eps, dtype)
            return self.masked(z, chain, group.name, slot, p)

        return displacement

    def step_along(self, slopes: Sequence[float], chain: Chain, clock: Clock) -> None:
        """Step the chain with the sum of the directions, each times its slope."""
        param_groups = {s.name: s for s in chain.param_groups()}

        def estimate(name: str) -> dict[str, Tensor]:
            moving = {k: p for k, p in param_groups[name].params.items() if p.requires_grad}
            return {k: self.combined(slopes, chain, clock, name, k, p) for k, p in moving.items()}

        chain.step(LazyGradients(param_groups, estimate))

    def slope(self, above: float, below: float) -> float:
        """What a direction counts, from the losses on both of its sides."""
        return (above - below) / (2 * self.eps)

    def masked(self, z: Tensor, chain: Chain, group: str, slot: str, p: Tensor) -> Tensor:
        """The direction of a tensor p, or the part of it that may move; z is given away."""
        return z

    def chosen(self, slopes: list[float], closure: Closure, chain: Chain, clock: Clock) -> list[float]:
        """What is made of the slopes before the step."""
        return slopes

    def combined(
        self, slopes: Sequence[float], chain: Chain, clock: Clock, group: str, slot: str, p: Tensor
    ) -> Tensor:
        """The sum of the directions of a tensor, each times its slope, in fp32."""
        parts = (direction(clock, i, group, slot, p, self.noise, g) for i, g in enumerate(slopes))
        return self.masked(reduce(add, parts), chain, group, slot, p)


def direction(
    clock,
    probe: int,
    group: str,
    slot: str,
    like: Tensor,
    noise: str = "normal",
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale * z of one tensor; z has mean 0 and variance 1, and is the same each time within a step. A CPU
    draws its pieces side by side.
    """
    on_cpu = like.device.type == "cpu"
    z = torch.empty(like.shape, device=like.device, dtype=dtype)
    pieces = z.view(-1).split(PIECE) if on_cpu else (z.view(-1),)
    table = z if not on_cpu else _table(noise, dtype) if len(pieces) == 1 else _scaled(noise, dtype, scale)

    def fill(k: int) -> None:
        names = (probe, group, slot, k) if k else (probe, group, slot)
        rng = torch.Generator(like.device).manual_seed(clock.derive_seed("mezo", *names))
        if on_cpu:
            looked_up(pieces[k], table, rng)
            if len(pieces) == 1:
                pieces[k].mul_(scale)
        elif noise == "normal":
            pieces[k].normal_(generator=rng).mul_(scale)
        else:
            pieces[k].random_(0, 2, generator=rng).mul_(2 * scale).sub_(scale)

    if len(pieces) > 1 and torch.get_num_threads() > 1:
        list(_threads(torch.get_num_threads()).map(fill, range(len(pieces))))
    else:
        for k in range(len(pieces)):
            fill(k)
    return z


_threads = lru_cache(maxsize=1)(ThreadPoolExecutor)  # begun once: a step draws for hundreds of tensors
FOUR = 4  # numbers that are looked up together
# four of them, as one number
WIDE = {torch.bfloat16: torch.int64, torch.float16: torch.int64, torch.float32: torch.complex128}


def looked_up(out: Tensor, table: Tensor, rng: torch.Generator) -> None:
    """Fill out [n]: 16 random bits choose four numbers."""
    count = -(-len(out) // FOUR)
    codes = (
        torch.empty(-(-count // 4), dtype=torch.int64)
        .random_(-(2**63), None, generator=rng)
        .view(torch.uint16)[:count]
        .int()
    )
    if len(out) == FOUR * count:
        torch.index_select(table, 0, codes, out=out.view(table.dtype))
    else:
        out.copy_(table.index_select(0, codes).view(out.dtype)[: len(out)])


@lru_cache(maxsize=4)
def _scaled(noise: str, dtype: torch.dtype, scale: float) -> Tensor:
    """Of a large tensor the table is scaled, not the numbers."""
    table = _table(noise, dtype)
    return (table.view(dtype) * scale).view(table.dtype)


@lru_cache(maxsize=6)
def _table(noise: str, dtype: torch.dtype) -> Tensor:
    """[65536] fours. sign: the last bits of their number. normal: each number goes through the middles of
    65,536 slices of equal probability, the four in orders that have nothing to do with each other (a lattice
    of Korobov's), covariance exactly I.
    """
    code = torch.arange(2**16)[:, None]
    if noise == "sign":
        z = ((code >> torch.arange(FOUR)) & 1) * 2.0 - 1
    else:
        # the factor: least of 400 in mixed moments
        place = code * torch.tensor([25045**k % 2**16 for k in range(FOUR)]) % 2**16
        z = torch.special.ndtri((place.double() + 0.5) / 2**16)
        z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / len(z)), z.T, upper=False).T
    return z.to(dtype).contiguous().view(WIDE[dtype]).view(-1)
