"""A few quadratic terms of one vector under an estimator that weighs them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from luthier.clock import Clock
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import build
from luthier.train.optimizer import Chain


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))


class Quadratics:
    """Terms `fast`, `slow` and, with `third`, one more; each of one coordinate of its own, minimal at 1."""

    def __init__(self, name: str, third: bool = False, **settings):
        self.model: Any = Vector()
        self.terms = {"fast": (0, 10.0), "slow": (1, 1.0)} | ({"third": (2, 3.0)} if third else {})
        tuner = TunedWeights(SimpleNamespace(name="vector"), self.model, lambda name, p: True)
        self.clock = Clock(total=100)
        self.chain = Chain([build("transform", "momentum")], tuner, self.clock, 5e-4)
        self.estimator, self.metrics = build("estimator", {"name": name, **settings}), {}

    def go(self, steps: int) -> Quadratics:
        weight = self.model.weight

        def closure(grad=True, only=lambda place, name: 1.0):
            weight.grad, total, closure.values = None, weight.sum() * 0, {}
            for place, (name, (coordinate, steepness)) in enumerate(self.terms.items()):
                value = steepness * (weight[coordinate] - 1).square() + 0.1
                factor = only(place, name)
                closure.values[name] = float(value.detach()) if factor else 0.0
                total = total + factor * value
            if grad:
                total.backward()
            return float(total.detach())

        closure.names, closure.note = list(self.terms), self.metrics.update
        for _ in range(steps):
            self.estimator.step(closure, self.chain, self.clock)
            self.clock.step += 1
        return self

    def state(self, name: str) -> dict:
        return next(iter(self.chain.state.values()))[name]
