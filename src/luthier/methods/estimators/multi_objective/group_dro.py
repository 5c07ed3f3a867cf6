"""Group DRO: the weight of each term of the objective grows with its loss, so that what is minimized is the
loss of the worst group.

At each step a group's weight is multiplied by exp(step_size * loss) and all are divided by their sum; the
step follows the losses with these weights (Sagawa et al., 2020). With `hard` the worst group of the batch
has all the weight. Groups are terms, as objective `by_source` makes them. Departs: weights are multiplied by
the number of terms, so that equal ones are the plain objective; losses are not adjusted by group size.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.registry import estimator


@estimator(
    paper="arXiv:1911.08731",
    row="bonsai-rfc",
    provides=[GRADIENT],
    use_when="the loss of the worst group of rows counts, such as of classes with a rare background.",
    costs="one more forward pass over each batch.",
    starting_rate="that of the tuner.",
    covers="the largest of the groups' mean losses as what is minimized, by exponentiated weights or the"
    " worst group alone.",
    omits="the plan that repeats discovery (stage `error_groups` makes a round's groups) and the synthesis of"
    " one network by distillation: rich features are not built.",
    tests=[
        "methods/estimators/multi_objective/test_group_dro.py::test_weights_grow_with_the_losses",
        "methods/estimators/multi_objective/test_group_dro.py::test_the_worst_group_alone",
    ],
)
class GroupDRO(Estimator):
    """One weighted backward pass. With one term it equals backprop."""

    fixed_tensors: ClassVar[bool] = True  # its weights lie beside those of the first

    step_size: Annotated[float, Field(ge=0)] = 0.01  # of the weights' exponentiated gradient
    hard: bool = False  # the worst group of each batch alone

    def step(self, closure, chain, clock):
        names = getattr(closure, "names", ())
        if len(names) < 2:
            loss = closure()
            chain.step(gradients(chain))
            return loss
        upper = chain.state.setdefault(chain.param_groups()[0].name, {}).setdefault("group_dro", {})
        if not upper:
            upper["weights"] = [1 / len(names)] * len(names)
        closure(grad=False)
        losses = torch.tensor([closure.values[name] for name in names], dtype=torch.float64)
        weights = self.weights(torch.tensor(upper["weights"], dtype=torch.float64), losses)
        upper["weights"] = weights.tolist()
        loss = closure(only=lambda place, name: len(names) * float(weights[place]))
        chain.step(gradients(chain))
        if note := getattr(closure, "note", None):
            note({f"mix/{name}": float(weights[i]) for i, name in enumerate(names)})
        return loss

    def weights(self, before: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """[terms] weights of the last step and losses of this one -> [terms] weights of sum 1."""
        if self.hard:
            return torch.nn.functional.one_hot(losses.argmax(), len(losses)).to(losses)
        return (before.log() + self.step_size * losses).softmax(0)
