"""Selective answers: how much risk is left where only the answers that a judge rates highest are given.

The curve has the mean loss (1 - label) of the best-rated share of answers for every share; `aurc` is its
mean over all shares. The threshold of a share is the lowest rating that is still answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.evaluators._base import Evaluator
from luthier.methods.evaluators.representation.implicit_value import correlation
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.stages._base import text_of
from luthier.registry import Metric, evaluator, nested


@evaluator(
    paper="arXiv:2409.00935",
    row="self-j",
    metrics=[
        Metric("aurc", "area under risk and coverage", better="lower"),
        Metric("selective_risk", "risk of the answers that are given", better="lower"),
        Metric("judge_correlation", "correlation of rating and label", better="higher"),
        Metric("abstention_threshold", "lowest rating that is answered"),
    ],
    requires=[COMPLETIONS, SCORES],
    use_when="a judge is to withhold doubtful answers: rows have labels from 0 to 1 as scores.",
    costs="a rating of every held-out completion.",
    covers="the curve, its area, the threshold and the risk at a coverage, the correlation with labels.",
    tests=["methods/evaluators/calibration/test_selective.py::test_the_curve_is_the_brute_force_one"],
)
class Selective(Evaluator):
    """`aurc`, `selective_risk` and `abstention_threshold` at the coverage, `judge_correlation` (Pearson)."""

    reward: Annotated[Any, nested("reward")] = "rating_judge"  # the judge that rates
    coverage: Annotated[float, Field(gt=0, le=1)] = 0.8  # share of answers that are given
    n: Annotated[int, Field(ge=1)] | None = None  # rows that are rated; null: all

    def run(self, roles, rows, folder, when):
        ratings: list[float] = []
        labels: list[float] = []
        for row in list(rows)[: self.n]:
            texts = [text_of(roles, c) for c in row["completions"]]
            ratings += map(float, self.reward.scores(row, texts))
            labels += map(float, row["scores"])
        if not ratings:
            return {}
        curve, lowest = risk_coverage(ratings, labels), threshold(ratings, self.coverage)
        answered = [1 - label for rating, label in zip(ratings, labels, strict=True) if rating >= lowest]
        out = {
            "aurc": sum(curve) / len(curve),
            "selective_risk": sum(answered) / len(answered),
            "abstention_threshold": lowest,
        }
        agreement = correlation(torch.tensor(ratings), torch.tensor(labels))
        if agreement is not None and len(set(ratings)) > 1 and len(set(labels)) > 1:
            out["judge_correlation"] = float(agreement)
        return out


def risk_coverage(ratings: Sequence[float], labels: Sequence[float]) -> list[float]:
    """The mean of 1 - label over the k best-rated answers, k = 1, 2, ...; of equals the earlier first."""
    order = sorted(range(len(ratings)), key=lambda i: -ratings[i])
    curve, total = [], 0.0
    for count, i in enumerate(order, 1):
        total += 1 - labels[i]
        curve.append(total / count)
    return curve


def threshold(ratings: Sequence[float], coverage: float) -> float:
    """The lowest rating of the share of answers that are rated highest."""
    count = max(1, round(coverage * len(ratings)))
    return sorted(ratings, reverse=True)[count - 1]
