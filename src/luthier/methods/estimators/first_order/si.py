"""SI: synaptic intelligence. A parameter is held near its value after earlier tasks by how much of the fall
of their losses is owed to it.

While a task is learned, each parameter gathers -gradient * change over the steps, its part of the path
integral of the loss (the gradient is that of the loss without the penalty). At the end its importance grows
by max(0, that) / (change over the whole task^2 + damping). The penalty is strength * sum of importance *
(p - p*)^2 with p* at the end of the last task (Zenke, Poole and Ganguli, 2017). Unlike EWC it needs no rows
beyond those of the steps. Departs: parts below zero count as 0, as in the code of later comparisons.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators.first_order._consolidation import Consolidation
from luthier.registry import Range, estimator


@estimator(
    paper="arXiv:1703.04200",
    row="code-cl-ood",
    provides=[GRADIENT],
    use_when="a model learns tasks in turn and nothing shall be read for it beyond the steps themselves, also"
    " where rows are sampled anew at each step.",
    costs="four copies of what trains, in fp32, and two more during a step.",
    starting_rate="that of the tuner.",
    covers="the path integral of each parameter, importances that add up over tasks, the penalty around the"
    " last end.",
    tests=[
        "methods/estimators/first_order/test_consolidation.py::test_the_path_integral_is_the_fall_of_the_loss",
        "methods/estimators/first_order/test_consolidation.py::test_importances_of_si_add_up_over_tasks",
    ],
)
class SI(Consolidation):
    """Backprop with a pull of each parameter by what it has contributed to earlier tasks."""

    damping: Annotated[float, Field(gt=0), Range(1e-4, 0.1, log=True)] = 1e-3  # beside the squared change

    def follow(self, chain, clock, grads, before):
        for group in chain.param_groups():
            path = self.memory(chain, group.name, "path")
            start = self.memory(chain, group.name, "start")
            for key, p in group.params.items():
                if key not in before.get(group.name, {}):  # it began to move within this step
                    continue
                was = before[group.name][key].float()
                if key not in start:
                    start[key], path[key] = was, p.new_zeros(p.shape, dtype=was.dtype)
                grad = grads.get(group.name, {}).get(key)
                if grad is not None:
                    path[key] -= grad.float() * (p.detach().float() - was)

    def finish_task(self, closure, chain, clock):
        for group in chain.param_groups():
            path = self.memory(chain, group.name, "path")
            start = self.memory(chain, group.name, "start")
            importance = self.memory(chain, group.name, "importance")
            anchors = self.memory(chain, group.name, "anchor")
            for key, p in group.params.items():
                if key not in start:
                    continue
                now = p.detach().float()
                change = (now - start.pop(key)).square()
                gain = path.pop(key).clamp(min=0) / (change + self.damping)
                importance[key] = importance[key] + gain if key in importance else gain
                anchors[key] = now.clone()
