"""CoBa: weights of tasks that follow the slopes of their held-out losses, so that all converge together and
none is trained on after its own loss has begun to rise.

With a_i the slope of task i's loss (over its first one) in a window, K tasks and N slopes so far: the
relative score softmax_i(K a_i / sum_j |a_j|) favours slow tasks, the absolute one softmax_i(-N a_i /
sum_s |a_i(s)|) those that still improve as they did. The divergence factor min(1, N softmax_s(-tau N
a_max(s) / sum |a_max|) now), a_max the slope of the largest loss, joins them: weights are softmax_i(K (DF *
relative + (1 - DF) * absolute)), at least a tenth of an equal share (Gong et al., 2024, and the code of
MFTCoder). Departs: `validation` names the term that holds a task's held-out rows; a task without one is
followed by the loss of its own rows before the step, which are new to the model in the first epoch. Weights
are multiplied by the number of tasks.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.registry import estimator


@estimator(
    paper="arXiv:2410.06741",
    row="mftcoder",
    provides=[GRADIENT],
    use_when="tasks converge at different rates, and those that are ready first should not be overfitted"
    " while the others are learned.",
    costs="a forward pass over each batch more.",
    starting_rate="that of the tuner.",
    covers="CoBa's relative and absolute scores of convergence, the divergence factor, the least weight.",
    tests=[
        "methods/estimators/multi_objective/test_coba.py::test_weights_shift_to_the_slower_task",
        "methods/estimators/multi_objective/test_coba.py::test_a_task_that_diverges_loses_weight",
        "methods/estimators/multi_objective/test_coba.py::test_held_out_terms_are_measured_and_not_learned",
    ],
)
class CoBa(Estimator):
    """One weighted backward pass; the losses of tasks lie in the optimizer's state. With one it equals
    backprop.
    """

    fixed_tensors: ClassVar[bool] = True  # its history lies beside those of the first

    # task (term) -> term of its held-out rows, e.g. {code: code_validation}
    validation: dict[str, str] = field(default_factory=dict)
    window: Annotated[int, Field(ge=2)] = 50  # steps that a slope is over
    warmup: Annotated[int, Field(ge=2)] = 10  # steps with equal weights at first
    tau: Annotated[float, Field(gt=0)] = 5.0  # how sharply the divergence factor looks at the present
    least: Annotated[float, Field(ge=0, le=1)] = 0.1  # of an equal share, that every task has

    def suits(self, objective):
        names = {term.name for _, term in objective.terms()}
        absent = sorted({*self.validation, *self.validation.values()} - names)
        if absent:
            raise RecipeError(
                f"estimator 'coba': validation: {', '.join(absent)} is no term of the objective, which has"
                f" {', '.join(sorted(names))}"
            )

    def step(self, closure, chain, clock):
        tasks = [n for n in getattr(closure, "names", ()) if n not in self.validation.values()]
        if len(tasks) < 2:
            loss = closure(only=lambda place, name: float(not tasks or name in tasks))
            chain.step(gradients(chain))
            return loss
        upper = chain.state.setdefault(chain.param_groups()[0].name, {}).setdefault("coba", {})
        upper.setdefault("losses", [[] for _ in tasks])
        upper.setdefault("slopes", [[] for _ in range(len(tasks) + 1)])
        followed = [self.validation.get(name, name) for name in tasks]
        closure(grad=False, only=lambda place, name: float(name in followed))
        for history, name in zip(upper["losses"], followed, strict=True):
            # a task that is absent from a batch stands where it stood
            value = closure.values[name]
            history.append(value if value or not history else history[-1])
        share = self.shares(upper)
        factors = {name: len(tasks) * float(share[i]) for i, name in enumerate(tasks)}
        loss = closure(only=lambda place, name: factors.get(name, 0.0))
        chain.step(gradients(chain))
        if note := getattr(closure, "note", None):
            note({f"mix/{name}": float(share[i]) for i, name in enumerate(tasks)})
        return loss

    def shares(self, upper: dict) -> Tensor:
        """[tasks] of sum 1, from the losses so far; slopes are added to their history."""
        losses = torch.tensor(upper["losses"], dtype=torch.float64)
        k, steps = losses.shape
        equal = torch.full((k,), 1 / k, dtype=torch.float64)
        if steps <= self.warmup:
            return equal
        recent = losses[:, -self.window :] / losses[:, :1].clamp(min=1e-12)
        now = [slope(each) for each in (*recent, recent.amax(0))]
        for history, value in zip(upper["slopes"], now, strict=True):
            history.append(value)
        slopes = torch.tensor(upper["slopes"], dtype=torch.float64)
        relative = normalized(slopes[:k, -1], 0).softmax(0)
        absolute = (-normalized(slopes[:k, -self.window :], 1))[:, -1].softmax(0)
        divergence = (-self.tau * normalized(slopes[k], 0)).softmax(0)[-1] * slopes.shape[1]
        factor = float(divergence.clamp(max=1))
        share = (k * (factor * relative + (1 - factor) * absolute)).softmax(0)
        return (1 - self.least) * share + self.least * equal


def slope(values: Tensor) -> float:
    """Of the least-squares line through values at 0, 1, 2, ..."""
    place = torch.arange(len(values), dtype=torch.float64)
    place = place - place.mean()
    return float((place * values).sum() / place.square().sum())


def normalized(values: Tensor, dim: int) -> Tensor:
    """values whose magnitudes have mean 1 along a dimension; zeros stay."""
    size = values.abs().mean(dim, keepdim=True)
    return values / size.clamp(min=1e-12)
