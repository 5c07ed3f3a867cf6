"""The harmonic mean of rewards: high only where each of them is.

Of two, `weights: [lambda, 1 - lambda]` give 1 / (lambda / i + (1 - lambda) / t), the lambda-harmonic reward
that weighs an image's likeness to its references (i) against its fit to the text (t). Each reward must be a
share from 0 to 1 (cosines as (cos + 1) / 2). A score of zero makes the mean zero, unless its weight is zero.
"""

from __future__ import annotations

from typing import Annotated, Any

from luthier.methods.rewards._base import Reward
from luthier.registry import nested_list, reward


@reward(
    example={"of": ["exact_match", "exact_match"]},
    paper="arXiv:2407.12164",
    row="rpo-lambda-harmonic",
    use_when="an answer must be good in every respect, and much of one must not make up for the lack of"
    " another, as in a weighted sum.",
    costs="those of its rewards.",
    covers="the lambda-harmonic reward as a mean of any rewards; a preference term that is log 2 at the start"
    " (objective `dpo`); the weights of the best evaluation at the end (`load_best_model_at_end`).",
    omits="diffusion: the U-Net, its denoising losses as log-probabilities, and the images of the base model"
    " as rejected ones; the similarities of ALIGN.",
    tests=["methods/rewards/combine/test_combine.py::test_harmonic_means"],
)
class Harmonic(Reward):
    """The weighted harmonic mean of scores from 0 to 1."""

    of: Annotated[Any, nested_list("reward")]  # the rewards
    weights: tuple[float, ...] | None = None  # a weight for each; null: equal ones

    def __post_init__(self):
        if not self.of:
            raise ValueError("of: give at least one reward")
        weights = self.weights
        if weights is not None and len(weights) != len(self.of):
            raise ValueError(f"weights: {len(weights)} weights for {len(self.of)} rewards")
        if weights is not None and (min(weights) < 0 or not sum(weights)):
            raise ValueError("weights: none may be negative, and one must be above zero")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        columns = []
        for judge in self.of:
            scores = judge.scores(row, texts)
            low = min(scores, default=0.0)
            if low < 0:
                raise ValueError(
                    f"reward 'harmonic': '{judge.name}' gives {low:g}, and a harmonic mean is of numbers from"
                    " 0 to 1; bring it there with reward `scaled`"
                )
            columns.append(scores)
        return [self.mean(list(each)) for each in zip(*columns, strict=True)]

    def mean(self, scores: list[float]) -> float:
        """The mean of one text's scores, one for each reward."""
        weights = self.weights or [1.0] * len(scores)
        parts = [(weight, score) for weight, score in zip(weights, scores, strict=True) if weight]
        if any(score == 0 for _, score in parts):
            return 0.0
        return sum(weight for weight, _ in parts) / sum(weight / score for weight, score in parts)
