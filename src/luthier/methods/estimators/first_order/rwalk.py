"""RWalk: Riemannian walk. A parameter is held near its value after earlier tasks by its Fisher information
and by how sensitive their losses were to it along the path.

The Fisher information is a moving average of squared gradients, brought up to date every `interval` steps and
through all tasks. The path score of a parameter grows with max(0, -sum of gradient * change) / (F / 2 *
change^2 + damping) over each interval: what the loss fell per distance in the distribution of answers. After
each task scores are averaged with those before, both are brought to [0, 1] over all parameters, and the
penalty is strength * sum of (F + score) (p - p*)^2 (Chaudhry et al., 2018). Without the scores it is their
EWC++.

Departs: scores of tasks are averaged as the paper has it, where the authors' code adds the average; an
interval that is not full at the end of a task counts for its score.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators.first_order._consolidation import Consolidation
from luthier.registry import Range, estimator


@estimator(
    paper="arXiv:1801.10112",
    row="code-cl-ood",
    provides=[GRADIENT],
    use_when="a model learns tasks in turn, and neither the Fisher information at their ends (`ewc`) nor the"
    " path to there (`si`) alone holds enough.",
    costs="up to seven copies of what trains, in fp32, and two more during a step.",
    starting_rate="that of the tuner.",
    covers="the moving Fisher information, path scores by Riemannian distance, their mean over tasks,"
    " importances brought to one scale; EWC++ without the scores.",
    omits="the stored samples that the paper adds: `replay` of plan `continual`.",
    tests=[
        "methods/estimators/first_order/test_consolidation.py::test_rwalk_is_its_formula_step_by_step",
        "methods/estimators/first_order/test_consolidation.py::test_rwalk_averages_scores_of_tasks",
    ],
)
class RWalk(Consolidation):
    """Backprop with a pull of each parameter by Fisher information and path score."""

    # share of the new squared gradients in the Fisher information
    decay: Annotated[float, Field(gt=0, le=1), Range(0.5, 1.0)] = 0.9
    interval: Annotated[int, Field(ge=1)] = 10  # steps after which Fisher information and scores are updated
    damping: Annotated[float, Field(gt=0), Range(1e-4, 0.1, log=True)] = 1e-3  # beside the squared distance
    scores: bool = True  # whether path scores count beside the Fisher information; without them: EWC++

    entries: ClassVar[tuple[str, ...]] = ("fisher", "squares", "path", "origin", "sums")

    def tables(self, chain: Any, group: str) -> dict[str, dict]:
        """Of a group: running Fisher information, squared gradients and path of this interval, where it
        began, and the score of this task.
        """
        return {entry: self.memory(chain, group, entry) for entry in self.entries}

    def follow(self, chain, clock, grads, before):
        due = (clock.step + 1) % self.interval == 0 or clock.step + 1 >= clock.total
        for group in chain.param_groups():
            tables = self.tables(chain, group.name)
            for key, p in group.params.items():
                if key not in before.get(group.name, {}):  # it began to move within this step
                    continue
                was, now = before[group.name][key].float(), p.detach().float()
                grad = grads.get(group.name, {}).get(key)
                grad = torch.zeros_like(now) if grad is None else grad.float()
                if key not in tables["origin"]:
                    tables["origin"][key] = was
                    for entry in ("squares", "path", "sums"):
                        tables[entry][key] = torch.zeros_like(now)
                if key not in tables["fisher"]:  # the first step of the first task
                    tables["fisher"][key] = grad.square()
                tables["squares"][key] += grad.square()
                tables["path"][key] -= grad * (now - was)
                if due:
                    self.close_interval(tables, key, now, clock.step % self.interval + 1)

    def close_interval(self, tables: dict[str, dict], key: str, now: Any, steps: int) -> None:
        """The score of an interval of so many steps, then the Fisher information, then a new interval."""
        fisher, distance = tables["fisher"][key], (now - tables["origin"][key]).square()
        tables["sums"][key] += tables["path"][key].clamp(min=0) / (0.5 * fisher * distance + self.damping)
        fisher.lerp_(tables["squares"][key] / steps, self.decay)
        tables["origin"][key] = now.clone()
        for entry in ("squares", "path"):
            tables[entry][key].zero_()

    def finish_task(self, closure, chain, clock):
        groups = chain.param_groups()
        for group in groups:
            tables, scores = self.tables(chain, group.name), self.memory(chain, group.name, "score")
            for key in list(tables["sums"]):
                new = tables["sums"].pop(key)
                scores[key] = (scores[key] + new) / 2 if key in scores else new
                for entry in ("squares", "path", "origin"):
                    del tables[entry][key]
        fishers = [self.memory(chain, g.name, "fisher") for g in groups]
        scores = [self.memory(chain, g.name, "score") for g in groups]
        low, spread = limits(fishers)
        score_low, score_spread = limits(scores)
        for group, fisher, score in zip(groups, fishers, scores, strict=True):
            importance = self.memory(chain, group.name, "importance")
            anchors = self.memory(chain, group.name, "anchor")
            for key in score:
                importance[key] = (fisher[key] - low) / spread
                if self.scores:
                    importance[key] = importance[key] + (score[key] - score_low) / score_spread
                anchors[key] = group.params[key].detach().float().clone()


def limits(tables: list[dict]) -> tuple[float, float]:
    """The least number of all tensors, and how far the largest lies above it (1 where all are equal)."""
    tensors = [t for table in tables for t in table.values() if t.numel()]
    if not tensors:
        return 0.0, 1.0
    low = min(float(t.min()) for t in tensors)
    spread = max(float(t.max()) for t in tensors) - low
    return low, spread if spread > 0 else 1.0
