"""Scores completions by a reward, the higher the better. Several rewards are added with weights."""

from __future__ import annotations

import math
from typing import Annotated

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import REWARDS, Stage, text_of
from luthier.registry import nested_list, stage


@stage(
    requires=[COMPLETIONS],
    provides=[SCORES, REWARDS],
    removes=[PAIRS],
    use_when="completions need scores from a reward: rules, verifiers or a reward model.",
    costs="one call of each reward for each completion.",
)
class Score(Stage):
    """Column `scores`; of several rewards also `rewards`, each by its name."""

    reward: Annotated[tuple, nested_list("reward")] = ("exact_match",)  # the reward, or a list of them
    reward_weights: list[float] | None = None  # weight of each reward in `scores`; all 1 if not given
    names: list[str] | None = None  # name of each reward in `rewards`; its method's name if not given

    def __post_init__(self):
        if not self.reward:
            raise ValueError("reward: give at least one reward")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights: {len(self.reward_weights)} weights for {len(self.reward)} rewards"
            )
        if self.names is not None and (
            len(self.names) != len(self.reward) or len(set(self.names)) < len(self.names)
        ):
            raise ValueError(
                f"names: {self.names} must have one distinct name for each of the {len(self.reward)} rewards"
            )

    @property
    def active_provides(self):
        return self.provides if len(self.reward) > 1 else self.provides - {REWARDS}

    def __call__(self, rows, roles):
        weights = self.reward_weights or [1.0] * len(self.reward)
        for row in rows:
            texts = [text_of(roles, c) for c in row["completions"]]
            each = [self.judged(judge, row, texts) for judge in self.reward]
            total = [
                sum(w * s for w, s in zip(weights, scores, strict=True)) for scores in zip(*each, strict=True)
            ]
            apart = {"rewards": {self.named(k): s for k, s in enumerate(each)}} if len(each) > 1 else {}
            yield {**row, "scores": total, **apart}

    def judged(self, judge, row: dict, texts: list[str]) -> list[float]:
        returned = list(judge.scores(row, texts))
        try:
            scores = [float(s) for s in returned]
        except (TypeError, ValueError):  # None, or a word
            scores = []
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            raise RecipeError(
                f"reward '{judge.name}' returned {returned[:8]} for the {len(texts)} completions"
                f" of row {row['id']}; it must return one finite number for each"
            )
        return scores

    def named(self, k: int) -> str:
        """The k-th reward's name: as said, else its method's, with its place where two have the same."""
        if self.names is not None:
            return self.names[k]
        names = [judge.name for judge in self.reward]
        return names[k] if names.count(names[k]) == 1 else f"{names[k]}-{k}"
