"""LoRA-GGPO: the gradient under noise in the weights, scaled row by row with the norms of weights and gradients.

Every LoRA module adds x E' to what it says, with E = randn(out, in) * (sigma |W_row| + beta |G_row|^2) / sqrt(out), drawn anew at
each reading. |W_row|^2 is the squared mean row norm of W plus the squared norm of the row of s B A; G is told from the last
step's gradients, s (B gA + gB A), so the first step has no noise. E is drawn again in backward and never kept, and only
row norms of G are: they lie in the optimizer's state, so a run resumes exactly. Measuring is without noise.
Not here: the paper's later revision, which perturbs along the momentum instead (MGPO).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.estimators._estimator import Estimator, gradients
from luthier.method import RecipeError, estimator


@estimator(paper="arXiv:2502.14538", row="lora-ggpo", wants="low-rank", gives="grad")
class GGPO(Estimator):
    """Gradient-guided perturbation of LoRA."""

    sigma: Annotated[float, Field(ge=0)] = 0.03  # noise by the norm of a row of the weight
    beta: Annotated[float, Field(ge=0)] = 0.01  # noise by the squared norm of a row of the gradient

    def step(self, closure, chain, clock):
        with self.noise(chain):
            loss = closure()
        found = gradients(chain)
        if self.sigma or self.beta:
            for name, layer, site in placed(chain):
                if found.get(name, {}).keys() >= {"A", "B"}:
                    G = full_gradient(site.slots, found[name], scale_of(layer))
                    chain.state.setdefault(name, {})["ggpo"] = {"rows": G.norm(dim=1)}
        chain.step(found)
        return loss

    @contextmanager
    def noise(self, chain):
        """For a while every module that has seen a gradient speaks under noise."""
        hooks = []
        try:
            for name, layer, site in placed(chain) if self.sigma or self.beta else ():
                if "ggpo" in chain.state.get(name, {}):
                    size = self.size(layer, site.slots, chain.state[name]["ggpo"]["rows"])
                    hooks.append(layer.register_forward_hook(lambda m, given, y, size=size: noisy(given[0], y, size)))
            yield
        finally:
            for h in hooks:
                h.remove()

    @torch.no_grad()
    def size(self, layer: Any, slots: Any, rows: Tensor) -> Tensor:
        """[out] the spread of each row of E."""
        from luthier.tuners._delta import oriented

        own = oriented(layer.get_base_layer()).float().norm(dim=1).mean()
        change = (slots["B"].float() @ slots["A"].float() * scale_of(layer)).norm(dim=1)
        return (self.sigma * (own.square() + change.square()).sqrt() + self.beta * rows.square()) / len(rows) ** 0.5


def placed(chain: Any):
    """Name, module and site of every LoRA that moves on a linear module."""
    layers = chain.attached.layers
    for site in chain.sites():
        if site.name in layers and {"A", "B"} <= site.slots.keys():
            yield site.name, layers[site.name], site


def scale_of(layer: Any) -> float:
    if not hasattr(layer, "scaling"):
        raise RecipeError("estimator 'ggpo' is for LoRA")
    return next(iter(layer.scaling.values()))


@torch.no_grad()
def full_gradient(slots: Any, grads: Any, scale: float) -> Tensor:
    """[out, in] what the gradients of A [r, in] and B [out, r] tell of the gradient of the whole weight."""
    return scale * (slots["B"].float() @ grads["A"].float() + grads["B"].float() @ slots["A"].float())


def noisy(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """y + x E'. The seed comes from torch's own generator, which a checkpointed layer finds as it was."""
    return y + _Noise.apply(x, size, int(torch.randint(2**62, ())))


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
    return (torch.randn(len(size), like.shape[-1], generator=rng, device=like.device) * size[:, None]).to(like.dtype)
