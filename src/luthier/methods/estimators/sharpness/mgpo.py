"""LoRA-MGPO: SAM with a single gradient per step, taken at weights that are perturbed along the momentum of
the gradients.

During the gradient computation, the weight of every LoRA module is W + s B A + E, with E = rho M / |M| / g,
where M = s (mB A + B mA) from the running means mA and mB of the factors' gradients, and g the running mean
of |s (gB A + B gA)|, 1 / g being at most 10. A module needs a gradient before it can be perturbed, so the
first step is that of plain LoRA. E is never materialised and no weight is overwritten: x E' and |M| are
computed from the factors. The reported training loss is that of the perturbed model; evaluation is without
perturbation.

Departs: the estimator keeps its own momentum instead of reading it from an optimizer, so it works with any
(with Adam's first beta as mu the direction is the same). E points uphill, as in SAM; the authors' code steps
downhill, which a negative rho does here.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.methods.estimators._lora import lora_groups, modified_outputs, scale_of
from luthier.methods.tuners._base import LORA
from luthier.registry import estimator


@estimator(
    paper="arXiv:2502.14538",
    row="lora-ggpo",
    requires=[LORA],
    provides=[GRADIENT],
    use_when="a LoRA overfits and SAM's second pass is too slow: it perturbs along the momentum.",
    costs="one forward and backward pass; running means of the factors' gradients.",
    starting_rate="that of `lora`.",
    covers="the later revision, which moves along the momentum.",
    omits="the authors' code descends along it; here the sign is a setting.",
    tests=[
        "methods/estimators/sharpness/test_mgpo.py::test_mgpo_takes_one_gradient_where_the_momentum_leads",
        "methods/estimators/sharpness/test_mgpo.py::test_noise_and_displacement_lead_to_flatter_places",
    ],
)
class MGPO(Estimator):
    """Momentum-guided perturbation of LoRA."""

    rho: float = 0.05  # norm of E for gradients of norm one; negative: downhill, ahead of the step
    mu: Annotated[float, Field(ge=0, lt=1)] = 0.9  # decay of the momentum
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9  # decay of the running gradient norm

    def step(self, closure, chain, clock):
        with modified_outputs(self.displacements(chain)):
            loss = closure()
        grads = gradients(chain)
        for name, layer, group in lora_groups(chain) if self.rho else ():
            if grads.get(name, {}).keys() >= {"A", "B"}:
                self.follow(chain.state.setdefault(name, {}), group.params, grads[name], scale_of(layer))
        chain.step(grads)
        return loss

    @torch.no_grad()
    def follow(self, state: dict, slots, grads, scale: float) -> None:
        """One more gradient of a module into its momentum and mean length."""
        g = {k: grads[k].float() for k in ("A", "B")}
        size = scale * length(slots["A"].float(), slots["B"].float(), g["A"], g["B"])
        if "mgpo" not in state:
            state["mgpo"] = {"A": torch.zeros_like(g["A"]), "B": torch.zeros_like(g["B"]), "size": size}
        momentum = state["mgpo"]
        momentum["A"].lerp_(g["A"], 1 - self.mu)
        momentum["B"].lerp_(g["B"], 1 - self.mu)
        momentum["size"] = momentum["size"].lerp(size, 1 - self.beta)

    @torch.no_grad()
    def displacements(self, chain):
        """Of every module that has seen a gradient: how it speaks with E in its weight."""
        for name, layer, group in lora_groups(chain) if self.rho else ():
            momentum = chain.state.get(name, {}).get("mgpo")
            if momentum is None:
                continue
            A, B = group.params["A"].detach().float(), group.params["B"].detach().float()
            whole = length(A, B, momentum["A"], momentum["B"])
            if whole > 0:
                factor = (
                    self.rho / whole * (1 / momentum["size"]).clamp(max=10)
                )  # s is in both lengths of M / |M|
                low, high = torch.cat([A, momentum["A"]]), torch.cat([momentum["B"], B], 1) * factor
                yield layer, lambda x, y, low=low, high=high: y + (x @ low.T.to(x.dtype)) @ high.T.to(x.dtype)


def length(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor) -> Tensor:
    """|dB A + B dA|, from products of r x r."""
    square = (
        ((dB.T @ dB) * (A @ A.T)).sum()
        + ((B.T @ B) * (dA @ dA.T)).sum()
        + 2 * ((dB.T @ B) * (A @ dA.T)).sum()
    )
    return square.clamp(min=0).sqrt()
