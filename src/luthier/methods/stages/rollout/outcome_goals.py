"""Asks for outcomes that samples had: every completion answers a prompt that names its own outcome, and one
that names the outcome of another.

What is learned from both (objective `outcome_balance`) is where texts lead, not which of them are good.
"""

from __future__ import annotations

import random
import re
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import SAMPLES, Stage, text_of, without
from luthier.registry import Column, stage

OUTCOME = Column("outcome", per="row", says="the outcome that a prompt asks for", example=("long", "short"))
ASK = "outcome: {outcome}"


@stage(
    paper="arXiv:2310.03419",
    row="oc-gflownet",
    requires=[COMPLETIONS],
    provides=[COMPLETIONS, SCORES, OUTCOME],
    removes=[PAIRS, SAMPLES],
    use_when="objective `outcome_balance` learns from samples or given texts, whatever they are worth.",
    costs="nothing.",
    covers="positive and negative outcomes of each completion.",
    omits="samples by an intrinsic reward.",
    tests=["methods/objectives/gflownet/test_outcomes.py::test_samples_are_asked_for_their_own_outcome"],
)
class OutcomeGoals(Stage):
    """A row for each completion and outcome; column `scores`, 1 where it is the completion's own."""

    asks_model = False

    # a regular expression whose first group is the outcome; texts without it leave
    outcome: str = r"(?s)\s*(.*\S)"
    ask: str = ASK  # how the prompt asks for an outcome
    negatives: int = 1  # foreign outcomes of each completion
    draw: int = 0  # number of the draw; another number gives other negatives

    def __post_init__(self):
        if not re.compile(self.outcome).groups:
            raise ValueError(f"outcome: '{self.outcome}' has no group, such as (.*)")
        if "{outcome}" not in self.ask:
            raise ValueError("ask: it must say where the {outcome} stands")

    def __call__(self, rows, roles):
        samples = []
        for row in rows:
            for completion in row["completions"]:
                samples.append((row, completion, outcome_of(self.outcome, text_of(roles, completion))))
        reached = sorted({outcome for _, _, outcome in samples if outcome})
        without_outcome = sum(not outcome for _, _, outcome in samples)
        self.left(roles, without_outcome, len(samples), f"nothing matches {self.outcome}")
        if samples and len(reached) < 2 and self.negatives:
            raise RecipeError(
                "stage 'outcome_goals' needs texts of two or more outcomes; these have "
                + (f"'{reached[0]}' alone" if reached else "none")
            )
        out: list[dict[str, Any]] = []
        for place, (row, completion, own) in enumerate(samples):
            if not own:
                continue
            rng = random.Random(roles.clock.derive_seed("outcome_goals", self.draw, row["id"], place))
            others = [outcome for outcome in reached if outcome != own]
            goals = [own, *rng.sample(others, min(self.negatives, len(others)))]
            for number, goal in enumerate(goals):
                asked_for = {"prompt": asking(row["prompt"], self.ask, goal), "outcome": goal}
                answer = {"completions": [completion], "scores": [float(number == 0)]}
                name = f"{row['id']}-{place}-{number}"
                out.append({**without(row), **asked_for, **answer, "id": name})
        return out


def outcome_of(pattern: str, text: str) -> str:
    """What the first group of a pattern matches; empty where it does not."""
    match = re.search(pattern, text)
    return "" if match is None else (match[1] or "").strip()


def asking(prompt: Any, ask: str, outcome: str) -> Any:
    """A prompt that asks for an outcome, on a line of its own."""
    line = ask.replace("{outcome}", outcome)
    if isinstance(prompt, str):
        return f"{prompt}\n{line}\n" if prompt else f"{line}\n"
    last = prompt[-1]
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        return [*prompt, {"role": "user", "content": line}]
    return [*prompt[:-1], {**last, "content": f"{last['content']}\n{line}"}]
