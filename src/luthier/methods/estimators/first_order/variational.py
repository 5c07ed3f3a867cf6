"""Variational inference: a normal distribution over what the tuner trains, instead of one value of it.

The parameters themselves are the means. Each step draws p = mean + sigma * noise, and the gradient at p is
that of the mean; times sigma * noise it is that of log sigma, which Adam steps with a rate of its own. Added
is kl_weight * KL(posterior || prior), whose gradients are (mean - m) / s^2 for the mean and sigma^2 / s^2 - 1
for log sigma, under a prior with mean m and deviation s: the evidence lower bound for kl_weight = 1 / rows.
The prior of a first run is normal around 0; a run that starts from another (`init_from`) has that one's
posterior as its prior and starts there (Lu et al., 2023; the estimator of Blundell et al., 2015). What is
saved and evaluated is the mean; deviations lie in the checkpoint.

Departs: the means start where the tuner starts, not at 0, and the deviations at `init_sigma`, not at 1.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients, perturbed
from luthier.methods.estimators.first_order._posterior import ENTRY, LOG_SIGMA
from luthier.methods.transforms._base import Params
from luthier.registry import Range, estimator

DECAYS = 0.9, 0.999  # of Adam's moments of log sigma
TINY = 1e-8  # beside their root


@estimator(
    paper="arXiv:2310.02995",
    row="ibcl",
    provides=[GRADIENT],
    use_when="you want to know how sure a run is of every number it trained: as a prior of the next task"
    " (plan `ibcl`) or to draw models from.",
    costs="six copies of what trains, in fp32, and one random draw for each number and step.",
    starting_rate="that of the tuner.",
    default_rate=1e-3,
    covers="reparameterized gradients of means and deviations, the divergence in closed form, priors around 0"
    " or around the start, posteriors as the priors of later runs.",
    omits="several draws a step, priors that are no diagonal normal distributions, a reparameterization for"
    " each row of a batch.",
    tests=[
        "methods/estimators/first_order/test_variational.py::test_gradients_are_those_of_the_bound",
        "methods/estimators/first_order/test_variational.py::test_without_spread_and_prior_it_is_backprop",
        "methods/estimators/first_order/test_variational.py::test_without_a_loss_the_posterior_becomes_the_prior",
    ],
)
class Variational(Estimator):
    """Backprop at a draw from the posterior, and a step of its deviations."""

    fixed_tensors: ClassVar[bool] = True
    persistent: ClassVar[str] = ENTRY

    prior_sigma: Annotated[float, Field(gt=0), Range(0.05, 3.0, log=True)] = 0.3  # of a first run's prior
    prior_mean: Literal["zero", "start"] = "zero"  # of a first run's prior; start: where the tuner starts
    init_sigma: Annotated[float, Field(ge=0), Range(1e-3, 0.3, log=True)] = 0.03  # of the posterior at first
    # weight of the divergence beside the mean loss; 1 / rows gives the evidence lower bound
    kl_weight: Annotated[float, Field(ge=0), Range(1e-6, 1e-2, log=True)] = 1e-4
    sigma_rate: Annotated[float, Field(ge=0)] = 1e-3  # learning rate of log sigma

    def step(self, closure, chain, clock):
        for group in chain.param_groups():
            self.begin(chain, group, clock)

        def aside(group, slot, p):
            sigma = chain.state[group.name][ENTRY][LOG_SIGMA][slot].exp()
            return sigma * self.noise(clock, group.name, slot, sigma)

        with perturbed(chain, aside):
            loss = closure()
        total, divergence = self.bounded(chain, clock, gradients(chain))
        if note := getattr(closure, "note", None):
            note({"kl": divergence})
        chain.step(total)
        return loss

    def noise(self, clock: Any, group: str, slot: str, like: Tensor) -> Tensor:
        """Standard normal numbers, the same each time within a step."""
        drawn = torch.randn(like.shape, generator=clock.rng("variational", group, slot))
        return drawn.to(like.device)

    @torch.no_grad()
    def begin(self, chain: Any, group: Any, clock: Any) -> None:
        """Prior and deviations of tensors that are new, and at the start of a run that goes on from one."""
        own = chain.state.setdefault(group.name, {}).setdefault(ENTRY, {})
        for slot, p in group.params.items():
            now = p.detach().float().clone()
            sigmas = own.setdefault(LOG_SIGMA, {})
            if slot not in sigmas:
                sigmas[slot] = torch.full_like(now, math.log(max(self.init_sigma, 1e-30)))
                middle = now if self.prior_mean == "start" else torch.zeros_like(now)
                spread = torch.full_like(now, math.log(self.prior_sigma))
            elif clock.step == 0:
                middle, spread = now, sigmas[slot].clone()
            else:
                continue
            own.setdefault("prior_mean", {})[slot] = middle
            own.setdefault("prior_log_sigma", {})[slot] = spread
            for moment in ("first", "second"):
                own.setdefault(moment, {})[slot] = torch.zeros_like(now)

    @torch.no_grad()
    def bounded(self, chain: Any, clock: Any, grads: dict[str, Params]) -> tuple[dict[str, Params], float]:
        """The gradients of the bound for the means, and the divergence; deviations are stepped."""
        total, divergence = {name: dict(slots) for name, slots in grads.items()}, 0.0
        for group in chain.param_groups():
            own = chain.state[group.name][ENTRY]
            for slot, p in group.params.items():
                if not p.requires_grad:
                    continue
                log_sigma, precision = own[LOG_SIGMA][slot], (-2 * own["prior_log_sigma"][slot]).exp()
                away = p.float() - own["prior_mean"][slot]
                ratio = (2 * log_sigma).exp() * precision
                divergence += 0.5 * float((ratio + away.square() * precision - 1 - ratio.log()).sum())
                pull = (self.kl_weight * away * precision).to(p.dtype)
                slots = total.setdefault(group.name, {})
                grad = slots.get(slot)
                slots[slot] = pull if grad is None else grad + pull
                slope = self.kl_weight * (ratio - 1)
                if grad is not None:
                    sigma = log_sigma.exp()
                    slope = slope + grad.float() * sigma * self.noise(clock, group.name, slot, sigma)
                self.widen(own, slot, slope, clock.step + 1)
        return total, divergence

    def widen(self, own: dict, slot: str, slope: Tensor, count: int) -> None:
        """A step of Adam for log sigma."""
        first, second = own["first"][slot], own["second"][slot]
        first.lerp_(slope, 1 - DECAYS[0])
        second.lerp_(slope.square(), 1 - DECAYS[1])
        mean, square = first / (1 - DECAYS[0] ** count), second / (1 - DECAYS[1] ** count)
        own[LOG_SIGMA][slot] -= self.sigma_rate * mean / (square.sqrt() + TINY)
