"""Samples at the temperature, and accepts from the score on, that balance exploration and exploitation best.

At each temperature of a grid the policy answers a few rows; for each threshold of a grid, the answers that
it would accept are looked at. A row's balance score is min(c / n*, 1) * c / n, where n answers are accepted,
c of them right and different, and n* right ones are wanted: few right answers want warmer samples and a lower
threshold, many wrong ones a higher one. The pair with the highest mean is used for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, SAMPLES, TRUNCATED, Stage, text_of
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Column, Range, build, nested, stage

THRESHOLD = Column("threshold", says="the smallest score that is accepted (stage `balanced_rollout`)")


@stage(
    example={"n": 2, "max_new_tokens": 3, "probed": 2, "temperatures": [1.0], "reward": "length"},
    paper="arXiv:2412.17256",
    row="b-star",
    requires=[GENERATE],
    provides=[COMPLETIONS, SAMPLES, TRUNCATED, SCORES, THRESHOLD],
    removes=[PAIRS, CACHED_LOGPROBS, OLD_LOGPROBS],
    use_when="a policy trains on its own accepted samples in rounds, and one temperature and threshold for"
    " all rounds would let it become narrow.",
    costs="as `rollout`, and `n` samples of `probed` rows at each temperature.",
    covers="the balance score, the grid of temperatures and thresholds, pass@k, best-of-k and the precision"
    " of what is accepted.",
    omits="distinct equations as a measure of exploration: distinct right answers are counted.",
    tests=[
        "methods/plans/rounds/test_b_star.py::test_the_balance_score_by_hand",
        "methods/plans/rounds/test_b_star.py::test_the_grid_search_is_brute_force",
    ],
)
class BalancedRollout(Stage):
    """Columns of `rollout`, `scores` and `threshold`. Measures temperature, threshold, balance, pass_at_k,
    best_of_k, accepted_precision.
    """

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that selects
    # the reward that says what is right, from 0.5 on; null: the one that selects
    gold: Any = None
    n: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # completions of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a completion
    temperatures: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5, 0.7, 0.9, 1.1)  # the grid
    thresholds: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)  # the grid
    probed: Annotated[int, Field(ge=1)] = 64  # rows on which the pair is chosen, evenly from all
    target: Annotated[int, Field(ge=1), Range(1, 8)] = 4  # right answers of a row that are wanted: n*
    draw: int = 0  # number of the draw; another number gives other samples

    def __call__(self, rows, roles):
        rows = list(rows)
        few = rows[:: max(1, len(rows) // self.probed)][: self.probed]
        probes = {}
        for place, temperature in enumerate(self.temperatures):
            probes[temperature] = self.probe(few, roles, temperature, place)
        temperature, threshold, balance = best_pair(probes, self.thresholds, self.target)
        chosen = probes[temperature]
        accepted = [
            answer for answers in chosen for answer in accepted_answers(answers, threshold, self.target)
        ]
        self.measure(
            roles,
            temperature=temperature,
            threshold=threshold,
            balance=balance,
            pass_at_k=share(any(answer.right for answer in answers) for answers in chosen),
            best_of_k=share(max(answers, key=lambda answer: answer.score).right for answers in chosen),
            accepted_precision=share(answer.right for answer in accepted),
        )
        # the probes had draws of their own
        for row in self.samples(rows, roles, temperature, len(self.temperatures)):
            texts = [text_of(roles, completion) for completion in row["completions"]]
            yield {**row, "scores": list(self.reward.scores(row, texts)), "threshold": threshold}

    def samples(self, rows: Sequence[dict], roles: Any, temperature: float, place: int) -> list[dict]:
        draw = self.draw * (len(self.temperatures) + 1) + place
        rollout = Rollout(n=self.n, max_new_tokens=self.max_new_tokens, temperature=temperature, draw=draw)
        return rollout(rows, roles)

    def probe(self, rows: Sequence[dict], roles: Any, temperature: float, place: int) -> list[list[Answer]]:
        """Of each row the answers at a temperature."""
        gold = self.reward
        if self.gold:
            gold = build("reward", self.gold)
        out = []
        for row in self.samples(rows, roles, temperature, place):
            texts = [text_of(roles, completion) for completion in row["completions"]]
            scores, right = self.reward.scores(row, texts), gold.scores(row, texts)
            answers = []
            for text, score, good in zip(texts, scores, right, strict=True):
                answers.append(Answer(text, float(score), good >= 0.5))
            out.append(answers)
        return out


@dataclass(frozen=True)
class Answer:
    """A sample as the two rewards see it."""

    text: str
    score: float
    right: bool


def balance_score(right: int, accepted: int, target: int) -> float:
    """min(c / n*, 1) * c / n; 0 where nothing is accepted. right: different right ones among the accepted."""
    return min(right / target, 1.0) * right / accepted if accepted else 0.0


def accepted_answers(answers: Sequence[Answer], threshold: float, target: int) -> list[Answer]:
    """At most `target` different answers whose score is high enough, the best first."""
    different = {answer.text: answer for answer in answers}.values()
    ranked = sorted(different, key=lambda answer: -answer.score)
    return [answer for answer in ranked if answer.score >= threshold][:target]


def mean_balance(probe: Sequence[Sequence[Answer]], threshold: float, target: int) -> float:
    """The balance score of a temperature's answers under a threshold, averaged over rows."""
    total = 0.0
    for answers in probe:
        accepted = accepted_answers(answers, threshold, target)
        total += balance_score(sum(answer.right for answer in accepted), len(accepted), target)
    return total / max(1, len(probe))


def best_pair(
    probes: dict[float, list[list[Answer]]], thresholds: Sequence[float], target: int
) -> tuple[float, float, float]:
    """The temperature and threshold with the highest mean balance, and this; of equals the first."""
    best = (next(iter(probes)), thresholds[0], -1.0)
    for temperature, probe in probes.items():
        for threshold in thresholds:
            balance = mean_balance(probe, threshold, target)
            if balance > best[2]:
                best = (temperature, threshold, balance)
    return best


def share(values: Iterator[bool]) -> float:
    """How many of some values are true; 0 of none."""
    every = list(values)
    return sum(every) / len(every) if every else 0.0
