"""Compares several preference losses on the same pairs: the reward that each gains, and whether it gains by
length.

For each loss, the reward of greedy answers to held-out prompts before and after, and how much longer the
answers have become. A warning is given where they are longer by `flag`, as the judge may prefer length. The
loss that ends with the highest reward is the plan's result.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.registry import nested, plan, spec


@plan(
    paper="arXiv:2410.07025",
    row="cxr-preference",
    use_when="you have pairs and do not know which preference loss suits them.",
    costs="one run for each objective, and answers to `judged` prompts before and after.",
)
class PreferenceLosses(Plan):
    """One run for each objective, all from the recipe's initial model. The table is printed at the end and
    stored in report.json.
    """

    objectives: Annotated[tuple[Any, ...], Field(min_length=1)] = (
        "dpo",
        "kto",
        "ipo",
        "simpo",
        "orpo",
    )  # the losses to compare, as in a recipe
    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores answers
    judged: Annotated[int, Field(ge=1)] = 64  # held-out prompts that are answered
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of an answer
    flag: Annotated[float, Field(gt=1)] = 1.2  # warn where answers have become longer by this factor

    def recipes(self, recipe):
        measure = {
            "name": "generate",
            "reward": spec(self.reward),
            "n": self.judged,
            "max_new_tokens": self.max_new_tokens,
        }
        reports = yield [
            recipe.but(objective=o, evaluate=[*(recipe.evaluate or ()), measure]) for o in self.objectives
        ]
        table = [self.line(o, r) for o, r in zip(self.objectives, reports, strict=True)]
        best = max(reports, key=lambda r: r.after["generated_reward"])
        best.stats["table"] = table
        for line in table:
            if line["length ratio"] > self.flag:
                best.notes.append(
                    f"{line['objective']}: answers are {line['length ratio']:.2f} times as long"
                    " as before; the judge may prefer length"
                )
        return best

    def line(self, objective: Any, report: Any) -> dict[str, Any]:
        """What became of one loss."""
        before, after = report.before, report.after
        return {
            "objective": objective if isinstance(objective, str) else str(spec(objective)),
            "reward before": before["generated_reward"],
            "reward": after["generated_reward"],
            "length ratio": after["generated_tokens"] / max(before["generated_tokens"], 1e-9),
        }
