"""What fine-tuning cost beside the trained task: skills before and after, and in one sentence what was lost.

Read from forgetting.json, which evaluator `forgetting` leaves in a run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import Damaged
from luthier.registry import metric as metric_of
from luthier.report.numbers import format_difference, format_metric
from luthier.storage import files

CHANGES = "forgetting.json"
LITTLE = 0.1  # a share below it has little to lose
NAMED = 4  # skills that the sentence names
REFUSING = "refusing unsafe requests"  # a skill of the shipped probe


@dataclass(frozen=True)
class Skill:
    """One skill, or one metric of the task, before and after, as text, and whether it was lost."""

    skill: str
    metric: str  # of a skill retention_accuracy or retention_loss
    rows: int
    before: float
    after: float
    difference: float
    low: float  # of the interval of the difference at 95 %
    high: float

    @property
    def better(self) -> bool | None:
        """None: the interval does not say."""
        if self.low <= 0 <= self.high:
            return None
        return (self.difference > 0) == metric_of(self.metric).higher_is_better

    @property
    def label(self) -> str:
        return f"{self.skill} (loss)" if self.metric == "retention_loss" else self.skill

    def cells(self) -> tuple[str, str, str, str, str]:
        """(rows, before, after, change, interval)."""
        low, high = format_difference(self.metric, self.low), format_difference(self.metric, self.high)
        change = "same"
        if self.difference:
            change = format_difference(self.metric, self.difference, unit=True)
        before, after = format_metric(self.metric, self.before), format_metric(self.metric, self.after)
        return str(self.rows), before, after, change, f"{low} to {high}"

    def phrase(self) -> str:
        """'arithmetic 62.5% → 40.0% (−22.5 points, interval −35.0 to −10.0)'."""
        _, before, after, change, interval = self.cells()
        return f"{self.label} {before} → {after} ({change}, interval {interval})"


def read_skills(folder: Path | str) -> list[Skill]:
    """The skills of a run's folder; none where they were not measured before and after."""
    path = Path(folder) / CHANGES
    if not path.is_file():
        return []
    try:
        return [skill_of(values) for values in files.read_object(path, skills=list)["skills"]]
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None


def skill_of(values: Mapping[str, Any]) -> Skill:
    """A skill as forgetting.json has it."""
    numbers = {key: float(values[key]) for key in ("before", "after", "difference", "low", "high")}
    return Skill(str(values["skill"]), str(values["metric"]), int(values["rows"]), **numbers)


def sentence(skills: Sequence[Skill]) -> str:
    """What was lost; empty where nothing was measured."""
    if not skills:
        return ""
    lost: list[Skill] = []
    gained, unclear, poor = [], [], []
    for skill in skills:
        if skill.better is False:
            lost.append(skill)
        else:
            (gained if skill.better else unclear).append(skill.label)
        if _was_poor(skill):
            poor.append(skill.label)
    lost.sort(key=lambda skill: (skill.metric, -abs(skill.difference)))
    parts = []
    if lost:
        phrases = [skill.phrase() for skill in lost[:NAMED]]
        if len(lost) > NAMED:
            phrases.append(f"and {len(lost) - NAMED} more")
        parts.append(f"What was lost: {'; '.join(phrases)}.")
    else:
        parts.append("What was lost: nothing that these rows can tell.")
    if gained:
        parts.append(f"Better: {_listed(gained)}.")
    if lost and unclear:
        parts.append(f"No change beyond chance: {_listed(unclear)}.")
    if poor:
        parts.append(f"Below {LITTLE:.0%} before training, so with little to lose: {_listed(poor)}.")
    return " ".join(parts)


def refusal_warning(changes: Sequence[Skill]) -> str:
    """What to say where tuning lowered refusals of unsafe requests beyond chance, on whatever rows it was
    done; else empty.
    """
    for change in changes:
        if (change.skill == REFUSING or change.metric == "refused_unsafe") and change.better is False:
            return (
                f"tuning lowered refusals of unsafe requests: {change.phrase()}; benign rows can do it, too:"
                " a lower learning rate, or rows that decline among the training rows, hold them"
            )
    return ""


def _was_poor(skill: Skill) -> bool:
    return skill.metric == "retention_accuracy" and skill.before < LITTLE and not skill.better


def _listed(names: Sequence[str]) -> str:
    """At most NAMED names."""
    if len(names) > NAMED:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return ", ".join(names)


HEAD = ("skill", "rows", "before", "after", "change", "interval (95%)")


def table(skills: Sequence[Skill]) -> dict[str, Any]:
    """All skills as {head, rows}."""
    return {"head": HEAD, "rows": [(skill.label, *skill.cells()) for skill in skills]}
