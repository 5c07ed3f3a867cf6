"""Several wordings of one question as an ensemble: accuracy and calibration of their mean, majority and
maximum.

Options of a row are scored under each of `templates`; probabilities among the options are averaged
(`mean`), the most frequent choice counts with its mean probability (`majority`), or the surest template
decides (`maximum`). The log loss of the mean is never above the mean of log losses; calibration usually
improves where a classifier is overconfident (Li et al., 2023). Departs: demonstrations are not varied; ECE
has ten bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, keep, paired
from luthier.methods.formats._base import PAIRS
from luthier.registry import Metric, evaluator

TEMPLATES = ("{prompt}", "Question: {prompt}\nAnswer:", "{prompt}\n", "Read this and answer.\n{prompt}")


@evaluator(
    metrics=[
        Metric("single_nll", "log loss of one template", better="lower"),
        Metric("ensemble_nll", "log loss of the ensemble of templates", better="lower"),
        Metric("single_ece", "calibration error of one template", unit="%", better="lower"),
        Metric("ensemble_ece", "calibration error of the ensemble", unit="%", better="lower"),
        Metric("single_option_accuracy", "accuracy of one template", unit="%", better="higher"),
        Metric("ensemble_option_accuracy", "accuracy of the ensemble", unit="%", better="higher"),
    ],
    paper="arXiv:2312.13772",
    row="self-ensemble-calibration",
    requires=[PAIRS, LOGPROBS],
    use_when="a classifier tuned on few rows is too sure of itself, and its answer depends on the wording.",
    costs="a forward pass over all options of the held-out rows for each template.",
    covers="log loss, calibration error and accuracy of single templates and of their ensembles by mean,"
    " majority and maximum.",
    omits="ensembles over demonstrations and their order; supervised in-context learning; macro F1.",
    tests=[
        "methods/evaluators/quality/test_prompt_ensemble.py::test_calibration_error_by_definition",
        "methods/evaluators/quality/test_prompt_ensemble.py::test_the_mean_loses_no_row",
        "methods/evaluators/quality/test_prompt_ensemble.py::test_an_overconfident_classifier",
        "methods/evaluators/quality/test_prompt_ensemble.py::test_of_a_language_model",
    ],
)
class PromptEnsemble(Evaluator):
    """`single_nll`, `single_ece` and `single_option_accuracy`, means over templates, and `ensemble_nll`,
    `ensemble_ece` and `ensemble_option_accuracy`.
    """

    # wordings of a question, {prompt} standing for it; of a conversation its last turn
    templates: list[str] = field(default_factory=lambda: list(TEMPLATES))
    combine: Literal["mean", "majority", "maximum"] = "mean"  # how templates make one answer
    bins: Annotated[int, Field(ge=1)] = 10  # bins of the calibration error
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def __post_init__(self):
        if not self.templates or not all("{prompt}" in template for template in self.templates):
            raise RecipeError("evaluator 'prompt_ensemble': each of `templates` needs {prompt}")

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        rows = paired(rows)
        if not rows:
            return {}
        by_template = [self.of_template(roles, rows, template) for template in self.templates]
        sums: dict[str, float] = {}
        singles: list[list[tuple[float, bool]]] = [[] for _ in self.templates]
        joint, losses = [], {}
        for row in rows:
            name = str(row["id"])
            right = max(range(len(row["scores"])), key=row["scores"].__getitem__)
            table = torch.stack([scores[name] for scores in by_template])  # [templates, options]
            for k, shares in enumerate(table):
                singles[k].append(sure(shares, right))
            answer = combined(table, self.combine)
            joint.append(sure(answer, right))
            losses[name] = -float(answer[right].clamp(min=1e-12).log())
            single = -float(table[:, right].clamp(min=1e-12).log().mean())
            sums["single_nll"] = sums.get("single_nll", 0.0) + single / len(rows)
        keep(folder, when, ensemble_nll=losses)
        count = len(self.templates)
        return {
            "single_nll": sums["single_nll"],
            "ensemble_nll": sum(losses.values()) / len(losses),
            "single_ece": sum(calibration_error(some, self.bins) for some in singles) / count,
            "ensemble_ece": calibration_error(joint, self.bins),
            "single_option_accuracy": sum(accuracy(some) for some in singles) / count,
            "ensemble_option_accuracy": accuracy(joint),
        }

    def of_template(self, roles: Any, rows: Sequence[dict], template: str) -> dict[str, Tensor]:
        """Row id -> [options] their probabilities among each other."""
        worded = [{**row, "prompt": reworded(row["prompt"], template)} for row in rows]
        shares = {}
        for batch in batches(roles, worded, self.batch_size):
            sums = batch.sums(roles.policy.logprobs(batch).double()).cpu()
            several = sums.split([len(row["completions"]) for row in batch.rows])
            for row, values in zip(batch.rows, several, strict=True):
                shares[str(row["id"])] = values.softmax(0)
        return shares


def reworded(prompt: Any, template: str) -> Any:
    """A prompt in another wording."""
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    *before, last = prompt
    return [*before, {**last, "content": template.replace("{prompt}", str(last["content"]))}]


def combined(table: Tensor, how: str) -> Tensor:
    """[M, K] probabilities of K options under M templates -> [K] those of the ensemble."""
    if how == "mean":
        return table.mean(0)
    if how == "maximum":
        return table[table.max(1).values.argmax()]
    votes = torch.bincount(table.argmax(1), minlength=table.shape[1])
    best = int((votes + table.mean(0)).argmax())  # among as many votes the more probable
    shares = table.mean(0)
    others = (1 - shares[best]) / max(1, len(shares) - 1)
    return torch.where(torch.arange(len(shares)) == best, shares[best], others)


def sure(shares: Tensor, right: int) -> tuple[float, bool]:
    """Probability of the choice, and whether it is right."""
    choice = int(shares.argmax())
    return float(shares[choice]), choice == right


def accuracy(answers: Sequence[tuple[float, bool]]) -> float:
    return sum(right for _, right in answers) / len(answers)


def calibration_error(answers: Sequence[tuple[float, bool]], bins: int) -> float:
    """(confidence, right) of each answer -> the gap of both in bins of equal width, by their size."""
    confidence = torch.tensor([value for value, _ in answers], dtype=torch.float64)
    right = torch.tensor([float(value) for _, value in answers], dtype=torch.float64)
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, confidence - right)
    return float(gaps.abs().sum()) / len(answers)
