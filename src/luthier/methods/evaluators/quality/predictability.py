"""How predictable scores of multiple-choice questions are from compute, and where that is lost on the way
to accuracy.

Accuracy is the last of a chain: log p of the right option, p of it, its share among the options, Brier
score, accuracy. For each question the rank correlation of each with compute, here the training step of this
run's measurements; the area under the share of questions whose |correlation| exceeds t, over t from 0 to 1.
It falls along the chain, since the mass on wrong options enters (Schaeffer et al., 2024), whose slope
against that on the right one, in logs, is measured as well. Departs: compute is the step; another ladder is
one run a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, keep, paired
from luthier.methods.evaluators._trajectory import record, spearman
from luthier.methods.formats._base import PAIRS
from luthier.registry import Artifact, Metric, evaluator

CHAIN = ("log_p_vocab", "p_vocab", "p_choices", "brier", "choice_accuracy")


@evaluator(
    metrics=[
        Metric("log_p_vocab", "log p of the right option", better="higher"),
        Metric("p_vocab", "p of the right option", better="higher"),
        Metric("p_choices", "p of the right option, among options", better="higher"),
        Metric("brier", "Brier score among options", better="lower"),
        Metric("choice_accuracy", "accuracy among options", unit="%", better="higher"),
        Metric("predictability", "rank correlation with steps, area over questions", better="higher"),
        Metric("wrong_mass_slope", "log mass of wrong options against the right one's"),
    ],
    artifacts=[Artifact("predictability.jsonl")],
    paper="arXiv:2406.04391",
    row="scaling-predictability",
    requires=[PAIRS, LOGPROBS],
    use_when="a benchmark of options jumps or stands still while the loss falls, and you ask which of its"
    " scores could be extrapolated.",
    costs="a forward pass over all options of the held-out rows at each evaluation.",
    covers="the five scores, the area under the survival function of |rank correlation| with compute for"
    " each, and the slope of wrong mass.",
    omits="ladders of several models in one table; Pearson's and Kendall's correlations.",
    tests=[
        "methods/evaluators/quality/test_predictability.py::test_two_options_and_a_constant_wrong_mass",
        "methods/evaluators/quality/test_predictability.py::test_the_area_is_the_mean",
        "methods/evaluators/quality/test_predictability.py::test_a_ladder_loses_along_the_chain",
        "methods/evaluators/quality/test_predictability.py::test_a_run_reports_the_whole_chain",
    ],
)
class Predictability(Evaluator):
    """`log_p_vocab`, `p_vocab`, `p_choices`, `brier`, `choice_accuracy`; from three measurements on
    `predictability/NAME` of each of them, `predictability`, that of accuracy, and `wrong_mass_slope`.
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        by_row: dict[str, dict[str, float]] = {}
        for batch in batches(roles, paired(rows), self.batch_size):
            sums = batch.sums(roles.policy.logprobs(batch).double()).cpu()
            logp = sums.split([len(row["completions"]) for row in batch.rows])
            for row, options in zip(batch.rows, logp, strict=True):
                by_row[str(row["id"])] = chain(options, torch.tensor(row["scores"]))
        if not by_row:
            return {}
        point = {"step": roles.clock.step, "questions": by_row}
        points = record(folder / "predictability.jsonl", when, point)
        columns = {name: {row: scores[name] for row, scores in by_row.items()} for name in CHAIN}
        keep(folder, when, **columns)
        metrics = {name: sum(column.values()) / len(column) for name, column in columns.items()}
        if len(points) < 3:
            return metrics
        return metrics | along([p["step"] for p in points], [p["questions"] for p in points])


def chain(options: Tensor, scores: Tensor) -> dict[str, float]:
    """log p of each option [K] and their scores [K], the highest being right -> the five scores, and the log
    mass of the wrong ones.
    """
    right = int(scores.argmax())
    shares = options.softmax(0)
    truth = torch.zeros_like(shares)
    truth[right] = 1.0
    wrong = torch.cat([options[:right], options[right + 1 :]])
    return {
        "log_p_vocab": float(options[right]),
        "p_vocab": float(options[right].exp()),
        "p_choices": float(shares[right]),
        "brier": float((shares - truth).square().sum()),
        "choice_accuracy": float(options.argmax() == right),
        "log_wrong": float(wrong.logsumexp(0)),
    }


def along(compute: Sequence[float], points: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Compute of each model and its scores by question -> `predictability/NAME`, `predictability` and
    `wrong_mass_slope`. A score that does not vary is not predicted: its correlation counts as 0.
    """
    questions = [name for name in points[0] if all(name in point for point in points)]
    if not questions:
        return {}
    x = torch.tensor(list(compute), dtype=torch.float64)
    metrics = {}
    for name in CHAIN:
        correlations = []
        for question in questions:
            values = torch.tensor([point[question][name] for point in points], dtype=torch.float64)
            correlations.append(spearman(x, values) or 0.0)
        metrics[f"predictability/{name}"] = area(torch.tensor(correlations, dtype=torch.float64))
    metrics["predictability"] = metrics["predictability/choice_accuracy"]
    slopes = []
    for question in questions:
        right = torch.tensor([point[question]["log_p_vocab"] for point in points], dtype=torch.float64)
        wrong = torch.tensor([point[question]["log_wrong"] for point in points], dtype=torch.float64)
        spread = (right - right.mean()).square().sum()
        if spread > 1e-12:
            slopes.append(float(((right - right.mean()) * (wrong - wrong.mean())).sum() / spread))
    if slopes:
        metrics["wrong_mass_slope"] = sum(slopes) / len(slopes)
    return metrics


def area(correlations: Tensor) -> float:
    """[Q] -> the area under t -> share of questions with |correlation| > t, for t from 0 to 1: 1 at most. It
    is the mean of |correlation|.
    """
    return float(correlations.abs().mean())
