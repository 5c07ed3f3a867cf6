"""Several objective terms, combined at the level of gradients: a method defines how the gradients of the
terms become one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.methods.estimators._base import Estimator, gradients
from luthier.methods.transforms._base import Params
from luthier.registry import family


@family
class Terms(Estimator):
    """Family: one backward pass per term of the objective, its weight included. With one term it equals
    backprop.
    """

    def combine(self, every: Tensor, losses: Tensor, rng: torch.Generator) -> Tensor:
        """[terms, terms] inner products of the terms' gradients, [terms] losses -> [terms] what each is
        multiplied by in the sum.
        """
        raise NotImplementedError

    def step(self, closure, chain, clock):
        terms = getattr(closure, "terms", 1)
        if terms == 1:  # one gradient is its own combination
            loss = closure()
            chain.step(gradients(chain))
            return loss
        losses, each = [], []
        for i in range(terms):
            losses.append(closure(only=lambda place, name, i=i: place == i))
            each.append(
                {name: {k: g.clone() for k, g in slots.items()} for name, slots in gradients(chain).items()}
            )
        rows = [torch.stack([_product(a, b) for b in each]) for a in each]
        products = torch.stack(rows).cpu()
        share = self.combine(
            products, torch.tensor(losses, dtype=torch.float64), clock.rng(self.name)
        ).tolist()
        chain.step(_mixed(each, share))
        return sum(losses)


def _product(a: dict[str, Params], b: dict[str, Params]) -> Tensor:
    """The inner product of two gradients, where they are."""
    total = torch.zeros((), dtype=torch.float64, device=_device(a))
    for name, slots in a.items():
        for k, grad in slots.items():
            if k in b.get(name, {}):
                total = total + (grad.double() * b[name][k].double()).sum()
    return total


def _device(grads: dict[str, Params]) -> torch.device:
    for slots in grads.values():
        for grad in slots.values():
            return grad.device
    return torch.device("cpu")


def _mixed(each: list[dict[str, Params]], share: list[float]) -> dict[str, Params]:
    out: dict[str, Params] = {}
    for grads, weight in zip(each, share, strict=True):
        for name, slots in grads.items():
            for k, g in slots.items():
                here = out.setdefault(name, {})
                here[k] = here[k] + weight * g if k in here else weight * g
    return out
