"""Short runs of Adam inside a stage, after which the policy is as it was: what a model learns from some rows
says something about them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.methods.stages.select._influence.gradients import parameters, row_losses


@contextmanager
def restored(roles: Any) -> Iterator[None]:
    """What trains is put back at the end."""
    tensors = roles.tuner.tensors()
    try:
        yield
    finally:
        roles.tuner.load(tensors)
        for p in parameters(roles.tuner):
            p.grad = None


@dataclass
class Moments:
    """Adam's state, flat in the order of `parameters`: m and v [D]."""

    m: Tensor
    v: Tensor
    steps: int = 0
    rate: float = 0.0  # mean of the learning rates so far in this epoch


class ShortRun:
    """Adam on the mean of row losses, at a rate that falls to zero along a line, after a short warm-up."""

    def __init__(self, roles: Any, rate: float, batch_size: int, name: str):
        self.roles, self.rate, self.batch_size, self.name = roles, rate, batch_size, name
        tensors = parameters(roles.tuner)
        self.sizes = [p.numel() for p in tensors]
        zeros = torch.zeros(sum(self.sizes), device=tensors[0].device)
        self.moments = Moments(zeros, zeros.clone())

    def epoch(self, rows: Sequence[dict], number: int, epochs: int) -> Moments:
        """One pass over the rows, in an order drawn by seed and number. Returns the moments at its end."""
        rng = self.roles.clock.rng(self.name, "order", number, at=0)
        order = torch.randperm(len(rows), generator=rng).tolist()
        per_epoch = -(-len(rows) // self.batch_size)
        rates = []
        for k in range(per_epoch):
            some = [rows[i] for i in order[k * self.batch_size : (k + 1) * self.batch_size]]
            rates.append(self.rate_at(number * per_epoch + k, epochs * per_epoch))
            self.step(some, rates[-1])
        self.moments.rate = sum(rates) / len(rates)
        return self.moments

    def rate_at(self, step: int, total: int) -> float:
        warm = max(1, round(0.03 * total))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * (total - step) / max(1, total - warm)

    def step(self, rows: Sequence[dict], rate: float) -> None:
        """One step on a batch, in evaluation mode: no dropout."""
        roles, tensors = self.roles, parameters(self.roles.tuner)
        batch = roles.batch(list(rows))
        with roles.policy.eval_mode(), torch.enable_grad():
            loss = row_losses(roles.policy, batch).mean()
            grads = torch.autograd.grad(loss, tensors, allow_unused=True)
        parts = []
        for p, g in zip(tensors, grads, strict=True):
            parts.append(torch.zeros_like(p).flatten() if g is None else g.flatten())
        gradient, state = torch.cat(parts).float(), self.moments
        state.steps += 1
        state.m = 0.9 * state.m + 0.1 * gradient
        state.v = 0.999 * state.v + 0.001 * gradient.square()
        m, v = state.m / (1 - 0.9**state.steps), state.v / (1 - 0.999**state.steps)
        update = rate * m / (v.sqrt() + 1e-8)
        with torch.no_grad():
            for p, part in zip(tensors, update.split(self.sizes), strict=True):
                p.sub_(part.view_as(p).to(p.dtype))


@torch.no_grad()
def mean_loss(roles: Any, rows: Sequence[dict], batch_size: int) -> float:
    """The mean loss of rows, without dropout."""
    total = 0.0
    with roles.policy.eval_mode():
        for first in range(0, len(rows), batch_size):
            batch = roles.batch(list(rows[first : first + batch_size]))
            total += float(row_losses(roles.policy, batch).sum())
    return total / max(1, len(rows))
