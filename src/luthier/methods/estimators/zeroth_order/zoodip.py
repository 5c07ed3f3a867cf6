"""ZOODiP's estimate: MeZO by one-sided differences, without the directions that its own past did not use.

A step costs the loss where the parameters are and one for each direction z: g is the mean of (L(p + eps z) -
L(p)) / eps z over `n_probes`, divided by sqrt((d + n - 1) / n), the length that noise in d dimensions gives
it. The last `tau` values of each tensor are stored. Every `tau` steps their principal components are taken,
each number scaled to variance 1; those that come after 1 - nu of the variance is explained are noise, and the
gradient's part along them is removed. They count no longer in d.

The paper tunes the embedding of one word for a quantized diffusion model; here any tensors may move, each
with a history of its own, and quantized weights stay as they are since only losses are computed. Departs: the
component that `tau` centered points cannot have is not counted; the paper's script takes 0.99 for nu, the
paper and we 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.clock import Clock
from luthier.errors import Refused
from luthier.methods.estimators._base import FORWARD_ONLY
from luthier.methods.estimators.zeroth_order._by_layer import perturbed_by_layer
from luthier.methods.estimators.zeroth_order.mezo import MeZO
from luthier.registry import estimator

if TYPE_CHECKING:
    from luthier.train.optimizer import Chain

STORE = "history"  # under this name a group's past lies in its state
LIMIT = 2**31  # bytes of all histories


@estimator(
    paper="arXiv:2503.14868",
    row="zoodip",
    provides=[FORWARD_ONLY],
    example={"n_probes": 4, "tau": 16},
    use_when="few numbers move (a prompt, one token) on a quantized network, and memory suffices for"
    " inference alone.",
    costs="one forward pass and one for each direction; `tau` copies of what moves, and every `tau` steps a"
    " singular value decomposition of them.",
    starting_rate="with `adamw` the paper takes 1e-2 and adam_epsilon 1e-3 for one token.",
    covers="one-sided estimates along the gradient (cosine > 0.9); no part along the trailing components of"
    " the history; the plain estimate where there are none; a tiny denoiser on frozen int8 weights gets"
    " better, its weights unchanged bit for bit.",
    omits="diffusion models as such: textual inversion of images, time steps drawn between 500 and 900; the"
    " paper's memory and scores.",
    tests=[
        "methods/estimators/zeroth_order/test_zoodip.py::test_no_part_along_trailing_components_is_left",
        "methods/estimators/zeroth_order/test_zoodip.py::test_without_trailing_components_it_is_the_estimate",
        "methods/estimators/zeroth_order/test_zoodip.py::test_it_points_along_the_gradient",
        "methods/estimators/zeroth_order/test_zoodip.py::test_a_denoiser_of_bytes_is_personalized",
    ],
)
class ZOODiP(MeZO):
    """(L(p + eps z) - L(p)) / eps z, without what the past says is noise."""

    norm: ClassVar[str] = ""  # that of the gradient: the length of a direction is divided out
    fixed_tensors = True  # each has a history

    tau: Annotated[int, Field(ge=2)] = 128  # values in the history, and steps between two looks at it
    # share of the history's variance whose directions are removed
    nu: Annotated[float, Field(ge=0, lt=1)] = 1e-3

    def step(self, closure, chain, clock):
        self.check_size(chain)
        here, slopes = closure(grad=False), []
        for probe in range(self.n_probes):
            with perturbed_by_layer(chain, self.aside(chain, clock, probe)):
                slopes.append((closure(grad=False) - here) / self.eps)
        n = self.n_probes
        length = ((self.dimensions(chain) + n - 1) / n) ** 0.5
        self.step_along([slope / (n * length) for slope in slopes], chain, clock)
        for group in chain.param_groups():
            for slot, p in group.params.items():
                if p.requires_grad:
                    self.record(p, past_of(chain, group.name, slot))
        return here

    def check_size(self, chain: Chain) -> None:
        """Raises Refused where the histories would not fit."""
        count = sum(p.numel() for g in chain.param_groups() for p in g.params.values() if p.requires_grad)
        if 4 * self.tau * count > LIMIT:
            raise Refused(
                f"estimator '{self.name}' stores the last {self.tau} values of each of {count:,} parameters,"
                f" {4 * self.tau * count / 2**30:.0f} GiB; use a smaller tau or a smaller tuner"
            )

    def dimensions(self, chain: Chain) -> int:
        """In which the estimate may point."""
        total = 0
        for group in chain.param_groups():
            for slot, p in group.params.items():
                if p.requires_grad:
                    basis = past_of(chain, group.name, slot).get("basis", ())
                    total += p.numel() - len(basis)
        return max(total, 1)

    def combined(
        self, slopes: Sequence[float], chain: Chain, clock: Clock, group: str, slot: str, p: Tensor
    ) -> Tensor:
        estimate = super().combined(slopes, chain, clock, group, slot, p)
        basis = past_of(chain, group, slot).get("basis")
        return estimate if basis is None else without(estimate, basis)

    @torch.no_grad()
    def record(self, p: Tensor, past: dict[str, Any]) -> None:
        """Add the value of a tensor to its past, and look at it when it is time."""
        if "values" not in past:
            past |= {"values": torch.zeros(self.tau, p.numel(), device=p.device), "count": 0}
        past["values"][past["count"] % self.tau] = p.detach().float().flatten()
        past["count"] += 1
        if past["count"] % self.tau == 0:
            past["basis"] = trailing_components(past["values"], self.nu)


def past_of(chain: Chain, group: str, slot: str) -> dict[str, Any]:
    """Of one tensor: values [tau, d], how many there were, and the basis [k, d] of what is removed."""
    return chain.state.setdefault(group, {}).setdefault(STORE, {}).setdefault(slot, {})


def trailing_components(values: Tensor, nu: float) -> Tensor:
    """[n, d] -> [k, d] orthonormal: principal components behind the first that explain more than 1 - nu of
    the variance, where each number has variance 1.
    """
    centered = values - values.mean(0)
    deviation = centered.square().mean(0).sqrt()
    scaled = centered / torch.where(deviation > 0, deviation, 1.0)
    _, singular, components = torch.linalg.svd(scaled, full_matrices=False)
    count = min(len(values) - 1, values.shape[1])
    shares = singular[:count].square().double().cumsum(0)
    if not shares[-1]:  # nothing has moved
        return components[:0]
    enough = (shares / shares[-1] > 1 - nu).nonzero()
    first = int(enough[0]) + 1 if len(enough) else count
    return components[first:count].contiguous()


def without(x: Tensor, basis: Tensor) -> Tensor:
    """x without its part along the orthonormal rows of basis [k, x.numel()]."""
    flat = x.flatten()
    return (flat - (basis @ flat) @ basis).view(x.shape)
