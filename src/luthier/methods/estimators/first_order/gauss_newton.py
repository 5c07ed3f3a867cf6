"""Sophia's curvature (Gauss-Newton-Bartlett): every `every` steps the squared gradient of labels that the
model draws itself says how curved the loss is along each number.

For each supervised token a label is drawn from the model's own distribution. With g the gradient of their
mean negative log-likelihood over all B tokens, B g^2 is in expectation the diagonal of the Gauss-Newton
matrix. Its running mean is what transform `sophia` divides by (`optim: sophia`). Gradients themselves are
those of `backprop`. Departs: the curvature is that of likelihoods whatever the objective is.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import TOPK
from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.methods.objectives._base import Objective
from luthier.registry import Range, estimator, family


@estimator(
    paper="arXiv:2305.14342",
    requires=[TOPK],
    provides=[GRADIENT],
    use_when="the optimizer is `sophia`.",
    costs="every `every` steps one more forward and backward pass.",
    starting_rate="that of the optimizer.",
    covers="labels drawn from the model, the diagonal of the Gauss-Newton matrix, its running mean.",
    omits="Hutchinson's estimate; regressions, which have no labels to draw.",
    tests=[
        "methods/optimizers/first_order/test_sophia.py::test_drawn_labels_measure_the_gauss_newton_diagonal",
        "methods/optimizers/first_order/test_sophia.py::test_a_run_learns_with_measured_curvature",
    ],
)
class GaussNewton(Estimator):
    """Backprop, and the curvature of some steps."""

    every: Annotated[int, Field(ge=1), Range(1, 50, log=True)] = 10  # steps between two measurements
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99  # decay rate of the curvature

    def chain_warnings(self, chain):
        if any(hasattr(transform, "curvature") for transform in chain):
            return []
        return [
            "estimator 'gauss_newton' measures for optim: sophia, and the optimizer here reads none of it"
        ]

    def step(self, closure, chain, clock):
        readers = [i for i, t in enumerate(chain.transforms) if hasattr(t, "curvature")]
        if readers and clock.step % self.every == 0 and hasattr(closure, "trainer"):
            self.measure(closure, chain, readers)
        loss = closure()
        chain.step(gradients(chain))
        return loss

    def measure(self, closure: Any, chain: Any, readers: list[int]) -> None:
        """Update the curvature in the state of the transforms that read it."""
        trainer = closure.trainer
        own, trainer.objective = trainer.objective, DrawnLabels()
        try:
            drawn = type(closure)(trainer, closure.batches)
            drawn()
        finally:
            trainer.objective = own
        with torch.no_grad():
            for group in chain.param_groups():
                state = chain.state.setdefault(group.name, {})
                for slot, p in group.params.items():
                    if p.grad is None:
                        continue
                    square = drawn.units[0] * p.grad.float().square()
                    for i in readers:
                        self.add(chain.transforms[i], state.setdefault(str(i), {}), slot, square)

    def add(self, transform: Any, state: dict, slot: str, square: Tensor) -> None:
        """One more measurement of a tensor."""
        if slot not in state:
            state[slot] = transform.init(square)
        state[slot][transform.curvature].lerp_(square, 1 - self.beta2)


@family
class DrawnLabels(Objective):
    """-log p of a label that is drawn from p, at each supervised token."""

    name = "drawn_labels"
    requires = frozenset()

    def loss(self, roles, batch):
        uniform = torch.empty(len(batch.owner))
        rows = batch.group[batch.owner].cpu()
        for place, row in enumerate(batch.rows):
            mine = rows == place
            rng = roles.clock.rng("drawn_labels", str(row.get("id", place)))
            uniform[mine] = torch.rand(int(mine.sum()), generator=rng)
        return roles.policy.outputs(batch).apply(drawn_losses, uniform.to(batch.ids.device))


def drawn_losses(logits: Tensor, uniform: Tensor) -> Tensor:
    """logits [C, V], a number from 0 to 1 each [C] -> [C] -log p of the label it falls on."""
    logprobs = logits.float().log_softmax(-1)
    below = logprobs.detach().exp().cumsum(-1) < uniform[:, None]
    labels = below.sum(-1).clamp(max=logits.shape[-1] - 1)
    return -logprobs.gather(1, labels[:, None])[:, 0]
