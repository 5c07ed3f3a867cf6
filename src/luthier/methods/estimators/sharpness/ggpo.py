"""LoRA-GGPO: computes the gradient under random weight noise, scaled row by row with the norms of weights and
gradients.

Every LoRA module adds x E' to its output, with E = randn(out, in) * (sigma |W_row| + beta |G_row|^2) /
sqrt(out), drawn anew for each step. |W_row|^2 is the squared mean row norm of W plus the squared norm
of the row of s B A; G is computed from the last step's gradients, s (B gA + gB A), so the first step has no
noise. E is drawn again in the backward pass and not stored; only row norms of G are stored, in the optimizer
state, so that a run resumes exactly. Evaluation is without noise. The paper's later revision, which perturbs
along the momentum instead, is estimator `mgpo`.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.methods.estimators._lora import (
    full_gradient,
    lora_groups,
    modified_outputs,
    scale_of,
)
from luthier.methods.tuners._base import LORA
from luthier.registry import estimator


@estimator(
    paper="arXiv:2502.14538",
    row="lora-ggpo",
    requires=[LORA],
    provides=[GRADIENT],
    use_when="a LoRA overfits: noise scaled to weights and gradients leads to flatter minima at hardly"
    " any cost.",
    costs="one forward and backward pass; the noise is drawn again in the backward pass and not stored.",
    starting_rate="that of `lora`.",
    covers="noise scaled by the rows of weights and gradients.",
    tests=[
        "methods/estimators/sharpness/test_ggpo.py::test_ggpo_without_noise_is_lora",
        "methods/estimators/sharpness/test_ggpo.py::test_ggpo_noise_has_the_spread_it_says",
    ],
)
class GGPO(Estimator):
    """Gradient-guided perturbation of LoRA."""

    sigma: Annotated[float, Field(ge=0)] = 0.03  # noise relative to the norm of a row of the weight
    beta: Annotated[float, Field(ge=0)] = 0.01  # noise relative to the squared norm of a row of the gradient

    def step(self, closure, chain, clock):
        with self.noise(chain, clock):
            loss = closure()
        grads = gradients(chain)
        if self.sigma or self.beta:
            for name, layer, group in lora_groups(chain):
                if grads.get(name, {}).keys() >= {"A", "B"}:
                    G = full_gradient(group.params, grads[name], scale_of(layer))
                    chain.state.setdefault(name, {})["ggpo"] = {"rows": G.norm(dim=1)}
        chain.step(grads)
        return loss

    def noise(self, chain, clock):
        """For a while every module that has seen a gradient speaks under noise: of a step and a module, so
        that all micro-batches have the same, on whatever process.
        """
        changes = []
        for name, layer, group in lora_groups(chain) if self.sigma or self.beta else ():
            if "ggpo" in chain.state.get(name, {}):
                size = self.size(layer, group.params, chain.state[name]["ggpo"]["rows"])
                seed = clock.derive_seed("ggpo", name)
                changes.append((layer, lambda x, y, size=size, seed=seed: noisy(x, y, size, seed)))
        return modified_outputs(changes)

    @torch.no_grad()
    def size(self, layer: Any, slots: Any, rows: Tensor) -> Tensor:
        """[out] the spread of each row of E."""
        from luthier.methods.tuners._delta import oriented

        own = oriented(layer.get_base_layer()).float().norm(dim=1).mean()
        change = (slots["B"].float() @ slots["A"].float() * scale_of(layer)).norm(dim=1)
        return (self.sigma * (own.square() + change.square()).sqrt() + self.beta * rows.square()) / len(
            rows
        ) ** 0.5


def noisy(x: Tensor, y: Tensor, size: Tensor, seed: int) -> Tensor:
    """y + x E'."""
    return y + _Noise.apply(x, size, seed)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, seed: int) -> Tensor:
        ctx.size, ctx.seed, ctx.width = size, seed, x.shape[-1]
        return x @ drawn(size, x, seed).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        like = grads[0].new_empty(0, ctx.width)
        return grads[0] @ drawn(ctx.size, like, ctx.seed), None, None


def drawn(size: Tensor, like: Tensor, seed: int) -> Tensor:
    """[out, in] E."""
    rng = torch.Generator(like.device).manual_seed(seed)
    return (torch.randn(len(size), like.shape[-1], generator=rng, device=like.device) * size[:, None]).to(
        like.dtype
    )
