"""Rounds of sampling, judging, selecting and training: what the plans of this folder share.

A round is a run: its stages sample with the weights that the round before ended with, note where each row
comes from (stage `provenance`), and select; its objective trains on what is left. A round is judged by the
reward of greedy answers to held-out prompts, since the reward of selected samples rises by selection alone.
Rounds end early where that reward stands still (`patience`), where samples become alike (`collapse`), or
where nothing is left to learn from. The state of a plan is the reports of its runs, so that one that was
killed goes on in the round where it was.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.errors import NO_ROWS, RecipeError
from luthier.methods.plans._base import Plan, better, one_epoch
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.recipe.read import name_of
from luthier.registry import Range, build, family, nested, provides_of, spec

METRIC = "generated_reward"


@family
class Rounds(Plan):
    """Family: a method says what it does with a round's samples (`select`) and what it trains (`aim`)."""

    rounds: Annotated[int, Field(ge=1), Range(1, 8)] = 3  # maximum number of rounds
    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores answers
    n: Annotated[int, Field(ge=1), Range(2, 32, log=True)] = 8  # completions of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a completion
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    fresh_prompts: bool = False  # give each round prompts of its own
    accumulate: bool = False  # train on the rows of earlier rounds again
    # held-out prompts whose greedy answers judge a round; 0: rounds are not judged
    judged: Annotated[int, Field(ge=0)] = 64
    gold: Any = None  # a trusted reward that is measured beside the one that selects
    result: Literal["best", "last"] = "best"  # which round's model is the result
    # end after so many rounds in a row without a better one; null: never
    patience: Annotated[int, Field(ge=1)] | None = None
    # end where distinct_2 of the samples falls below this share of the first round's; 0: never
    collapse: Annotated[float, Field(ge=0, le=1)] = 0.0

    def sample(self, number: int) -> list[Any]:
        """The stages that write and score a round's samples."""
        rollout = {
            "name": "rollout",
            "n": self.n,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "draw": number,
        }
        return [rollout, {"name": "score", "reward": [spec(self.reward)]}]

    def select(self, number: int) -> list[Any]:
        """The stages that make training rows of a round's scored samples."""
        raise NotImplementedError

    def aim(self, recipe: Any) -> Any:
        """What a round trains."""
        return recipe.objective or "sft"

    def changes(self, number: int, recipe: Any, last: str | None) -> dict[str, Any]:
        """Further changes to a round's recipe. last: folder of the round before."""
        return {}

    def recipes(self, recipe):
        table: list[dict[str, Any]] = []
        folders: list[str] = []
        champion, report, idle, reason = None, None, 0, ""
        untuned: float | None = None  # the reward of the model before the first round
        for number in range(self.rounds):
            try:
                report = yield self.round(number, recipe, folders)
            except RecipeError as error:
                if error.code != NO_ROWS or report is None:
                    raise
                reason = f"round {number}: nothing is left to learn from"
                break
            if not folders:
                untuned = report.before.get(METRIC)
            folders.append(report.folder)
            table.append(row_of(number, report))
            idle += 1
            if better(report, champion, METRIC) and reaches(report, untuned):
                champion, idle = report, 0
            reason = self.stops(table, idle)
            if reason:
                break
        final = champion if self.result == "best" else report
        if final is None:  # no round is as good as the model that they began with: a run that holds it
            final = yield recipe.but(
                objective=None, stages=[], online_stages=[], evaluate=self.evaluators(recipe)
            )
            reason = "no round answers as well as the model before the first one, which is the result"
        final.stats["rounds"] = table
        if reason:
            final.notes.append(reason)
        return final

    def round(self, number: int, recipe: Any, folders: list[str]) -> Any:
        """The recipe of a round. folders: of the rounds before."""
        stages = [*recipe.stages]
        if self.fresh_prompts:
            stages.append({"name": "shard", "part": number, "of": self.rounds})
        stages += self.sample(number)
        stages.append({"name": "provenance", "round": number, "gold": spec(self.gold)})
        stages += self.select(number)
        if self.accumulate and folders:
            stages.append({"name": "earlier_rounds", "folders": list(folders)})
        last = folders[-1] if folders else None
        changes = {"stages": stages, "objective": self.aim(recipe), **one_epoch(recipe)}
        if last is not None:
            changes["init_from"] = last
        if self.judged:
            changes["evaluate"] = self.evaluators(recipe)
        return recipe.but(**{**changes, **self.changes(number, recipe, last)})

    def evaluators(self, recipe: Any) -> list[Any]:
        """The recipe's, with the one that judges a round."""
        others = [e for e in recipe.evaluate or () if name_of(e) != "generate"]
        return [*others, self.judging()]

    def judging(self) -> dict[str, Any]:
        """The evaluator that judges a round."""
        how = {"n": self.judged, "max_new_tokens": self.max_new_tokens}
        return {"name": "generate", "reward": spec(self.reward), **how}

    def stops(self, table: list[dict[str, Any]], idle: int) -> str:
        """Why no further round is begun; empty where one is."""
        if self.patience is not None and idle >= self.patience:
            return f"the held-out reward has not risen for {idle} rounds"
        first, now = table[0].get("distinct_2"), table[-1].get("distinct_2")
        if self.collapse and first and now is not None and now < self.collapse * first:
            return (
                f"samples have become alike: distinct_2 is {now:.2f}, in the first round it was {first:.2f}"
            )
        return ""


def reaches(report: Any, untuned: float | None) -> bool:
    """Is a round's model as good as the untuned one? Where one of them was not measured, it may be."""
    now = report.after.get(METRIC)
    return now is None or untuned is None or now >= untuned


def row_of(number: int, report: Any) -> dict[str, Any]:
    """A round in numbers: what its stages measured on the samples, and the reward on held-out prompts."""
    row: dict[str, Any] = {"round": number, **(report.stats.get("stages") or {})}
    for when, metrics in (("before", report.before), ("after", report.after)):
        if METRIC in metrics:
            row[f"held_out_{when}"] = metrics[METRIC]
    return row


def reference_at(which: str, recipe: Any) -> dict[str, Any]:
    """The recipe's roles with a reference: "round", what a round starts from, or "start", what the plan
    starts from. One that the recipe names itself stays.
    """
    if "reference" in recipe.roles:
        return recipe.roles
    if which == "round":
        return {**recipe.roles, "reference": "initial"}
    if recipe.init_from is None:
        if DISABLE_ADAPTER in provides_of(build("tuner", recipe.tuner)):
            return {**recipe.roles, "reference": "base"}
        return {**recipe.roles, "reference": {"name": "model", "model": recipe.model}}
    if not isinstance(recipe.init_from, str):
        raise RecipeError(
            "this plan's reference is the model that it starts from, and init_from names several; set"
            " `roles: {reference: {name: model, model: FOLDER}}`, or reference: round"
        )
    return {**recipe.roles, "reference": {"name": "model", "model": recipe.init_from}}
