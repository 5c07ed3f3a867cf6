"""Pairs that teach how sure to sound (LACIE): a listener hears each answer without its final answer, and what
he believes should be what is right.

A completion that is right and believed is worth 1, one that is wrong and not believed as well; right and not
believed -0.5, wrong and believed -1. Of two completions of a question the more useful one is chosen, where
the listener tells them apart. Believed is what he accepts more readily than the median completion, which
takes out a listener's habit of saying yes.
"""

from __future__ import annotations

import re
from itertools import combinations
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, pick, text_of
from luthier.registry import nested, stage

REMOVED = "[ANSWER REMOVED]"
# (is it right, is it believed) -> what it is worth
UTILITY = {(True, True): 1.0, (False, False): 1.0, (True, False): -0.5, (False, True): -1.0}


@stage(
    paper="arXiv:2405.21028",
    row="lacie",
    example={"listener": "length", "correct": {"name": "regex", "pattern": "no"}, "least_gap": 0.0},
    contract={"gives": "the contract's rows have one completion, and a pair takes two"},
    requires=[COMPLETIONS],
    provides=[PAIRS, SCORES],
    use_when="answers sound equally sure whether they are right or wrong: under `stages` behind `rollout`"
    " (n: 10, temperature: 0.7), with objective `dpo`.",
    costs="a listener's judgement of each completion.",
    covers="the listener without the final answer, acceptance above the median, the table of utilities, the"
    " least difference and the most pairs of a question.",
    omits="balancing the kinds of pairs; the paper's few-shot prompt of its listener.",
    tests=[
        "methods/stages/curate/test_listener_pairs.py::test_the_table_of_preferences",
        "methods/stages/curate/test_listener_pairs.py::test_the_answer_is_hidden",
        "methods/stages/curate/test_listener_pairs.py::test_the_listener_learns_what_is_right",
    ],
)
class ListenerPairs(Stage):
    """Rows of two completions, the better first; `scores` are their utilities."""

    # who hears the text and says how readily he accepts it, from 0 to 1
    listener: Annotated[Any, nested("reward")] = "option_judge"
    correct: Annotated[Any, nested("reward")] = "exact_match"  # says what is right: 0.5 or more
    answer: str = r"answer(?: is|:)\s*([^.\n]+)"  # regular expression whose first group is the final answer
    least_gap: Annotated[float, Field(ge=0)] = 0.1  # smallest difference of two acceptances
    most: Annotated[int, Field(ge=1)] = 3  # pairs of a question

    def __post_init__(self):
        try:
            groups = re.compile(self.answer).groups
        except re.error as error:
            raise ValueError(f"answer: {error}") from None
        if not groups:
            raise ValueError("answer: it has no group that holds the final answer")

    def __call__(self, rows, roles):
        rows, judged = list(rows), []
        for row in rows:
            texts = [text_of(roles, c) for c in row["completions"]]
            right = [score >= 0.5 for score in self.correct.scores(row, texts)]
            accepted = self.listener.scores(row, [self.hidden(text) for text in texts])
            judged.append((right, [float(p) for p in accepted]))
        every: list[float] = []
        for _, accepted in judged:
            every += accepted
        threshold = median(every) if every else 0.0
        out = []
        for row, (right, accepted) in zip(rows, judged, strict=True):
            worth = utilities(right, accepted, threshold)
            for i, j in preferred(worth, accepted, self.least_gap)[: self.most]:
                scores = [worth[i], worth[j]]
                out.append({**pick(row, (i, j)), "id": f"{row['id']}/{i}/{j}", "scores": scores})
        lost = len(rows) - len({row["id"].rsplit("/", 2)[0] for row in out})
        self.left(roles, lost, len(rows), "their completions are worth the same to the listener")
        return out

    def hidden(self, text: str) -> str:
        """The text without its final answer, wherever that occurs."""
        match = re.search(self.answer, text, flags=re.IGNORECASE)
        if match is None or not match[1].strip():
            return text
        return text.replace(match[1].strip(), REMOVED)


def utilities(right: list[bool], accepted: list[float], threshold: float) -> list[float]:
    """What each completion is worth."""
    return [UTILITY[good, p > threshold] for good, p in zip(right, accepted, strict=True)]


def preferred(worth: list[float], accepted: list[float], least_gap: float) -> list[tuple[int, int]]:
    """Places of the better and the worse of each pair; those come first that differ most in worth."""
    pairs = []
    for i, j in combinations(range(len(worth)), 2):
        if worth[i] != worth[j] and abs(accepted[i] - accepted[j]) >= least_gap:
            pairs.append((i, j) if worth[i] > worth[j] else (j, i))
    return sorted(pairs, key=lambda pair: worth[pair[1]] - worth[pair[0]])
