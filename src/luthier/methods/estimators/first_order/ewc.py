"""EWC: elastic weight consolidation. A parameter is held near its value after earlier tasks as strongly as
their answers depend on it, by the diagonal of the Fisher information.

The penalty is strength / 2 * sum over tasks and parameters of F (p - p*)^2 (Kirkpatrick et al., 2017). F is
the mean square of the gradient of single rows' losses at the end of a task, over `fisher_rows` of its rows
(the empirical Fisher: with the rows' own answers). The quadratics of all tasks are kept as one, with the sum
of their F and the weighted mean of their p*, which is exact. `online: true` holds everything at the last end
instead, with earlier F times `decay` (Huszar, 2018; Schwarz et al., 2018).

For a stream: `plan: {name: continual, ...}` and `estimator: {name: ewc, strength: 100}`. A row's loss is the
mean over its tokens, so strengths are not those of sums.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators.first_order._consolidation import Consolidation
from luthier.registry import Range, estimator


@estimator(
    paper="arXiv:1612.00796",
    row="code-cl-ood",
    provides=[GRADIENT],
    use_when="a model learns tasks in turn, earlier rows are gone, and you accept a second copy of what"
    " trains.",
    costs="two copies of what trains, in fp32, and a backward pass for each of `fisher_rows` rows.",
    starting_rate="that of the tuner.",
    covers="the quadratic penalty with the diagonal of the empirical Fisher, exact for any number of tasks;"
    " the online variant.",
    omits="the Fisher of answers that the model samples itself.",
    tests=[
        "methods/estimators/first_order/test_consolidation.py::test_the_penalty_is_the_quadratic_of_all_tasks",
        "methods/estimators/first_order/test_consolidation.py"
        "::test_the_fisher_of_a_logistic_regression_is_the_closed_form",
        "methods/estimators/first_order/test_consolidation.py::test_a_run_holds_what_the_run_before_needs",
    ],
)
class EWC(Consolidation):
    """Backprop with a pull of each parameter to where earlier tasks left it, by its Fisher information."""

    factor: ClassVar[float] = 0.5
    follows_path: ClassVar[bool] = False

    fisher_rows: Annotated[int, Field(ge=1)] = 200  # training rows that tell the Fisher information
    online: bool = False  # one penalty, around the end of the last task, instead of one for each task
    # what the Fisher information of earlier tasks is multiplied by at the end of each task
    decay: Annotated[float, Field(ge=0, le=1), Range(0.5, 1.0)] = 1.0

    def suits_recipe(self, recipe, methods):
        if methods.online_stages:
            raise RecipeError(
                f"estimator '{self.name}' reads single training rows at the end of a run, but stage"
                f" '{methods.online_stages[0].name}' makes those of this recipe at each step; use estimator"
                " 'si' or 'rwalk'"
            )

    def finish_task(self, closure, chain, clock):
        fisher = self.fisher(closure, chain, clock)
        for group in chain.param_groups():
            importance = self.memory(chain, group.name, "importance")
            anchors = self.memory(chain, group.name, "anchor")
            for key, p in group.params.items():
                name = f"{group.name}.{key}"
                if name not in fisher:  # it began to move within this step
                    continue
                new, now = fisher[name], p.detach().float()
                if key not in importance:
                    importance[key], anchors[key] = new, now.clone()
                    continue
                old = self.decay * importance[key]
                both = old + new
                if self.online:
                    anchors[key] = now.clone()
                else:
                    mean = (old * anchors[key] + new * now) / both.clamp(min=torch.finfo(both.dtype).tiny)
                    anchors[key] = torch.where(both > 0, mean, now)
                importance[key] = both

    def fisher(self, closure: Any, chain: Any, clock: Any) -> dict[str, Tensor]:
        """Name -> the mean square of rows' gradients, in fp32. A closure without rows is one row."""
        sums, rows = {}, 1
        for group in chain.param_groups():
            for key, p in group.params.items():
                sums[f"{group.name}.{key}"] = (p, torch.zeros_like(p, dtype=torch.float32))
        trainer = getattr(closure, "trainer", None)
        if trainer is None:
            closure()
            self.add_squares(sums)
        else:
            count = len(trainer.rows)
            chosen = torch.randperm(count, generator=clock.rng("fisher"))[: self.fisher_rows].tolist()
            rows = len(chosen)
            for _ in trainer.rows_closure([trainer.rows[i] for i in chosen]).row_gradients():
                self.add_squares(sums)
            for _, total in sums.values():
                total.copy_(trainer.processes.sum(total))
        return {name: total / rows for name, (_, total) in sums.items()}

    @torch.no_grad()
    def add_squares(self, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add the squared gradient of a row, as it lies in p.grad."""
        for p, total in sums.values():
            if p.grad is not None:
                total += p.grad.float().square()
