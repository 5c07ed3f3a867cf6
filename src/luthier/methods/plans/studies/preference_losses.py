"""Compares several preference losses on the same pairs: the reward that each gains, and whether it gains by
length.

For each loss, the reward of greedy answers to held-out prompts before and after, how much longer the answers
have become in tokens, the reward at equal length, and what the loss costs on other tasks. The reward at equal
length is where a line through the changes of reward and of length in characters, prompt by prompt, has no
change of length. A warning is given where answers are longer by `flag`, as the judge may prefer length. The
loss that ends with the highest reward is the plan's result. Pairs with a least difference of scores come from
stage `pairs` and its `margin`.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.recipe.read import name_of
from luthier.registry import nested, plan, spec
from luthier.storage import files

TAX = {"retention_loss": "loss elsewhere", "retention_accuracy": "accuracy elsewhere"}  # metric -> column


@plan(
    paper="arXiv:2410.07025",
    row="cxr-preference",
    use_when="you have pairs and do not know which preference loss suits them.",
    costs="one run for each objective, answers to `judged` prompts before and after, and rows of other tasks"
    " read before and after.",
    covers="one recipe from pairs to five losses and a table with reward, length ratio, reward at equal"
    " length and the cost on other tasks; any reward is the judge.",
    omits="chest X-rays and a vision-language model; the paper's judge and its other metrics of reports.",
    tests=[
        "methods/plans/studies/test_preference_losses.py::test_a_table_with_length_and_tax",
        "methods/plans/studies/test_preference_losses.py::test_a_gain_by_length_alone_is_none_at_equal_length",
        "methods/plans/studies/test_preference_losses.py::test_pairs_differ_by_the_margin",
        "data/test_profile.py::test_losses_side_by_side_and_who_plays_the_judge_by_length",
    ],
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
    # rows of other tasks, as in a recipe's `data`, on which the cost of each loss is measured; auto: as
    # the recipe's evaluator `forgetting` finds them; null: not measured
    tax: Any = "auto"

    def recipes(self, recipe):
        measure = {
            "name": "generate",
            "reward": spec(self.reward),
            "n": self.judged,
            "max_new_tokens": self.max_new_tokens,
        }
        evaluate = [*(recipe.evaluate or ()), measure]
        if self.tax is not None:
            others = {"name": "forgetting", "data": None}
            for own in evaluate:
                if name_of(own) == "forgetting" and isinstance(own, dict):
                    others = own
            if self.tax != "auto":
                others = {**others, "data": self.tax}
            evaluate = [e for e in evaluate if name_of(e) != "forgetting"] + [others]
        reports = yield [recipe.but(objective=o, evaluate=evaluate) for o in self.objectives]
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
        line = {
            "objective": objective if isinstance(objective, str) else str(spec(objective)),
            "reward before": before["generated_reward"],
            "reward": after["generated_reward"],
            "length ratio": after["generated_tokens"] / max(before["generated_tokens"], 1e-9),
        }
        gain = gain_at_equal_length(Path(report.folder))
        if gain is not None:
            line["reward at equal length"] = before["generated_reward"] + gain
        for metric, label in TAX.items():
            if metric in before and metric in after:
                line[label] = after[metric] - before[metric]
        return line


def gain_at_equal_length(folder: Path) -> float | None:
    """What the answers gained in reward where they are as long as before: the constant of a least-squares
    line through (change of length in characters, change of reward) of each prompt. None where no answers are
    in the run's folder.
    """
    paths = [folder / f"samples-{when}.jsonl" for when in ("before", "after")]
    if not all(path.is_file() for path in paths):
        return None
    before = {row["id"]: row for row in files.read_rows(paths[0])}
    lengths, scores = [], []
    for other in files.read_rows(paths[1]):
        if other["id"] not in before:
            continue
        one = before[other["id"]]
        if one["score"] is not None and other["score"] is not None:
            lengths.append(len(other["answer"]) - len(one["answer"]))
            scores.append(other["score"] - one["score"])
    if not scores:
        return None
    mean_length, mean_score = fmean(lengths), fmean(scores)
    spread = sum((x - mean_length) ** 2 for x in lengths)
    if not spread:  # all alike: nothing tells length from merit
        return mean_score
    slope = sum((x - mean_length) * y for x, y in zip(lengths, scores, strict=True)) / spread
    return mean_score - slope * mean_length
