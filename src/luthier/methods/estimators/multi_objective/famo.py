"""FAMO: weights of the terms that follow how much each one's loss fell in the last step, so that all improve
at the same rate.

With D_i = loss_i - floor, a step follows sum_i c z_i log D_i, z = softmax(xi) and c = 1 / sum_i (z_i / D_i):
the weight of a term is proportional to z_i / D_i. The batch is then read once more, and xi moves along the
gradient of sum_i z_i (log D_i before - log D_i after), by Adam: terms that improved most lose weight (Liu et
al., 2023). Departs: weights are multiplied by the number of terms, so that equal ones are the plain
objective.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.registry import estimator


@estimator(
    paper="arXiv:2306.03792",
    row="mftcoder",
    provides=[GRADIENT],
    use_when="an objective has several terms (tasks, sources) and all should improve at the same rate; for"
    " one backward pass a step, unlike `pcgrad`.",
    costs="two more forward passes over each batch.",
    starting_rate="that of the tuner.",
    covers="FAMO's weights of tasks from the change of their losses.",
    omits="losses of held-out rows in their place: `coba` has these.",
    tests=[
        "methods/estimators/multi_objective/test_famo.py::test_weights_shift_to_the_slower_task",
        "methods/estimators/multi_objective/test_famo.py::test_weights_are_those_of_the_authors_formula",
    ],
)
class FAMO(Estimator):
    """One weighted backward pass, and a look at the same batch after the step. With one term it equals
    backprop.
    """

    fixed_tensors: ClassVar[bool] = True  # its logits lie beside those of the first

    weight_learning_rate: Annotated[float, Field(ge=0)] = 0.025  # Adam's, for the logits of the weights
    decay: Annotated[float, Field(ge=0)] = 0.01  # of the logits, towards equal weights
    floor: float = 0.0  # the least that a loss can be

    def step(self, closure, chain, clock):
        if len(getattr(closure, "names", ())) < 2:
            loss = closure()
            chain.step(gradients(chain))
            return loss
        upper = chain.state.setdefault(chain.param_groups()[0].name, {}).setdefault("famo", {})
        if not upper:
            zeros = [0.0] * len(closure.names)
            upper.update(x=zeros, mean=zeros, square=zeros, count=0)
        # the weights stand on the losses, which are there only after a look
        closure(grad=False)
        before = self.distance(closure)
        weights = self.weights(vector(upper["x"]), before)
        loss = closure(only=lambda place, name: float(weights[place]))
        chain.step(gradients(chain))
        closure(grad=False)
        self.move(upper, before, self.distance(closure))
        if note := getattr(closure, "note", None):
            names = closure.names
            note({f"mix/{name}": float(weights[i]) / len(names) for i, name in enumerate(names)})
        return loss

    def distance(self, closure) -> torch.Tensor:
        """[terms] the losses above the floor."""
        values = [closure.values[name] for name in closure.names]
        return (torch.tensor(values, dtype=torch.float64) - self.floor).clamp(min=1e-8)

    def weights(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """[terms] of sum the number of terms."""
        share = x.softmax(0) / distance
        return len(x) * share / share.sum()

    def move(self, upper: dict, before: torch.Tensor, after: torch.Tensor) -> None:
        """One step of Adam on the logits."""
        x, mean, square = (vector(upper[name]) for name in ("x", "mean", "square"))
        z, gain = x.softmax(0), before.log() - after.log()
        gradient = z * (gain - (z * gain).sum()) + self.decay * x
        count = upper["count"] + 1
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        move = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        x = x - self.weight_learning_rate * move
        upper.update(x=x.tolist(), mean=mean.tolist(), square=square.tolist(), count=count)


def vector(values: list[float]) -> torch.Tensor:
    """[terms] in fp64: lists are what a checkpoint holds bit for bit."""
    return torch.tensor(values, dtype=torch.float64)
