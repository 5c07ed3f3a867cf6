"""Pareto domain adaptation: weights the terms by a linear program so that their common step also lowers a
guide term that is not trained on.

The guide is one term of the objective, such as the loss of held-out rows with `by_source`: its gradient is
computed but not followed. Among the combinations of the other terms' gradients that increase none of them
(except those that conflict with the guide), the one that lowers the guide most is used; where the guide's
loss is nearly zero, the one that lowers all terms together most. Departs: the paper's guide is the entropy of
predictions on unlabelled images of another domain, here any term.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators._terms import Terms
from luthier.registry import estimator


@estimator(
    paper="arXiv:2112.04137",
    row="pareto-da",
    provides=[GRADIENT],
    use_when="a term that is not trained on (such as held-out rows of another domain) should steer the"
    " weights of the others.",
    costs="one backward pass and one stored gradient for each term.",
    starting_rate="that of the tuner.",
)
class ParetoDA(Terms):
    """The step is the combination times the number of `terms`, so that its scale is that of a plain sum."""

    guide: int = -1  # the term that guides and is not trained on, counted from 0; -1: the last
    eps: Annotated[float, Field(ge=0)] = 1e-3  # loss of the guide below which it is satisfied

    def combine(self, every, losses, rng):
        n = len(every)
        if not -n <= self.guide < n:
            raise RecipeError(
                f"pareto_da: guide: {self.guide} does not exist: the objective has {n} terms, counted from 0"
            )
        guide = self.guide % n
        others = [i for i in range(n) if i != guide]
        C, c = every[others][:, others].numpy(), every[others][:, guide].numpy()
        share = torch.zeros(n, dtype=every.dtype)
        share[others] = len(others) * torch.from_numpy(weights(C, c, float(losses[guide]) > self.eps))
        return share


def weights(C: np.ndarray, c: np.ndarray, guided: bool) -> np.ndarray:
    """C [k, k] inner products of gradients, c [k] theirs with the guide's -> [k] on the simplex."""
    from scipy.optimize import linprog

    k, scale = len(C), float(np.abs(C).max())
    if k == 1 or not scale:
        return np.full(k, 1 / k)
    least = np.zeros(k)
    if guided and (c > 0).any():
        least = np.where(c > 0, -np.inf, c)
        least[int(c.argmax())] = 0.0
    bound = np.isfinite(least)
    gain = c if guided else C.sum(0)
    length = float(np.abs(gain).max()) or 1.0
    solution = linprog(
        -gain / length,
        A_ub=-C[bound] / scale,
        b_ub=-least[bound] / scale,
        A_eq=np.ones((1, k)),
        b_eq=[1.0],
        bounds=(0, 1),
    )
    # the shortest mix meets every bound: but for rounding one is found
    return solution.x if solution.status == 0 else np.full(k, 1 / k)
