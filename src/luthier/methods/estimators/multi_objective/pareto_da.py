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
    covers="the program of the weights: on the simplex, within its bounds, for gradients of any lengths;"
    " a guide that falls where a plain sum raises it (objective `tcm` is the paper's).",
    omits="heads trained by their own losses alone; images.",
    tests=[
        "methods/estimators/multi_objective/test_pareto_da.py::test_the_pareto_program_keeps_its_bounds",
        "methods/estimators/multi_objective/test_pareto_da.py::test_a_guide_goes_down_where_a_plain_sum_would_raise_it",
        "methods/estimators/multi_objective/test_pareto_da.py::test_a_small_task_keeps_its_bound_beside_a_large_one",
    ],
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
    """C [k, k] inner products of gradients, c [k] theirs with the guide's -> [k] on the simplex.

    The program is solved for directions of length one, the shortest gradient's share counted as one, so that
    its tolerance is the same for a small task as for a large one.
    """
    from scipy.optimize import linprog

    k, lengths = len(C), np.sqrt(np.diag(C).clip(min=0))
    if k == 1 or not lengths.any():
        return np.full(k, 1 / k)
    shortest = lengths[lengths > 0].min()
    lengths = np.where(lengths > 0, lengths, shortest)
    least = np.zeros(k)
    if guided and (c > 0).any():
        least = np.where(c > 0, -np.inf, c)
        least[int(c.argmax())] = 0.0
    bound = np.isfinite(least)
    gain = (c if guided else C.sum(0)) / lengths
    cosines = C / np.outer(lengths, lengths)
    solution = linprog(
        -gain / (float(np.abs(gain).max()) or 1.0),
        A_ub=-cosines[bound],
        b_ub=-least[bound] / (lengths[bound] * shortest),
        A_eq=(shortest / lengths)[None],
        b_eq=[1.0],
        bounds=(0, None),
    )
    # the shortest mix meets every bound: but for rounding one is found
    if solution.status != 0:
        return np.full(k, 1 / k)
    shares = solution.x * shortest / lengths
    return shares / shares.sum()
