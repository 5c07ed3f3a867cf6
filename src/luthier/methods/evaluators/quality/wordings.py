"""How much accuracy depends on the wording of an instruction: mean and standard deviation over wordings that
tuning has seen, over new ones, and the gap between both.

Options of a row are scored under each wording, and the likeliest is the answer (Sun et al., 2023). The
deviation is that of the wordings at hand, not an estimate for others. Departs: the wordings are templates for
all rows and not of each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from statistics import fmean, pstdev
from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, keep, paired
from luthier.methods.evaluators.quality.prompt_ensemble import TEMPLATES, PromptEnsemble
from luthier.methods.formats._base import PAIRS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("wording_accuracy", "accuracy, mean over wordings of training", unit="%", better="higher"),
        Metric("wording_deviation", "deviation of accuracy over these", unit="%", better="lower"),
        Metric("new_wording_accuracy", "accuracy, mean over new wordings", unit="%", better="higher"),
        Metric("new_wording_deviation", "deviation of accuracy over new wordings", unit="%", better="lower"),
        Metric("wording_gap", "accuracy lost by new wordings", unit="%", better="lower"),
    ],
    paper="arXiv:2306.11270",
    row="instruction-robust-soft-prompt",
    requires=[PAIRS, LOGPROBS],
    use_when="you want to know whether a tuned model answers a task in whatever words it is put.",
    costs="a forward pass over all options of the held-out rows for each wording.",
    covers="means and deviations over wordings of training and new ones, and the gap.",
    omits="the distance of a new wording from those of training; the paper's instructions.",
    tests=["methods/evaluators/quality/test_wordings.py::test_mean_and_deviation_of_a_script"],
)
class Wordings(Evaluator):
    """Over wordings of training and new ones: means `wording_accuracy` and `new_wording_accuracy`, deviations
    `wording_deviation` and `new_wording_deviation`, and `wording_gap`, the first mean minus the second.
    """

    # wordings that the model was tuned on, {prompt} standing for the prompt; of a conversation its last turn
    templates: list[str] = field(default_factory=lambda: list(TEMPLATES[:1]))
    new_templates: list[str] = field(default_factory=lambda: list(TEMPLATES[1:]))  # other wordings
    batch_size: Annotated[int, Field(ge=1)] | None = None  # rows read at once; by default as many as fit

    def __post_init__(self):
        for name in ("templates", "new_templates"):
            own = getattr(self, name)
            if not own or not all("{prompt}" in template for template in own):
                raise RecipeError(f"evaluator 'wordings': each of `{name}` needs {{prompt}}")

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        rows = paired(rows)
        if not rows:
            return {}
        old = [self.right(roles, rows, template) for template in self.templates]
        new = [self.right(roles, rows, template) for template in self.new_templates]
        keep(folder, when, wording_accuracy=shares(old), new_wording_accuracy=shares(new))
        of_old, of_new = [accuracy(one) for one in old], [accuracy(one) for one in new]
        return {
            "wording_accuracy": fmean(of_old),
            "wording_deviation": pstdev(of_old),
            "new_wording_accuracy": fmean(of_new),
            "new_wording_deviation": pstdev(of_new),
            "wording_gap": fmean(of_old) - fmean(of_new),
        }

    def right(self, roles, rows: Sequence[dict], template: str) -> dict[str, bool]:
        """Row id -> is the likeliest option the best one?"""
        options = PromptEnsemble(templates=[template], batch_size=self.batch_size)
        chosen = {}
        by_row = options.of_template(roles, rows, template)
        for row in rows:
            best = max(range(len(row["scores"])), key=row["scores"].__getitem__)
            chosen[str(row["id"])] = int(by_row[str(row["id"])].argmax()) == best
        return chosen


def accuracy(right: dict[str, bool]) -> float:
    return fmean(float(value) for value in right.values())


def shares(every: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Row id -> the share of wordings under which it is right."""
    return {name: fmean(float(one[name]) for one in every) for name in every[0]}
