"""What fine-tuning changed, each metric with the interval of its change: one list for the sentence, the dot
plot and the conditions of a check-up.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.evaluators._base import paired_change, per_example_file
from luthier.registry import did_you_mean, former_metrics, metrics
from luthier.registry import metric as metric_of
from luthier.report.numbers import format_difference
from luthier.report.retention import NAMED, Skill
from luthier.storage import files

RETENTION = ("retention_accuracy", "retention_loss")
POINTS, UNITS = "change in points", "change in the units of the metric"


def measured_changes(folder: Path | str) -> list[Skill]:
    """Every metric that was measured row by row before and after, in the order of the registry."""
    paths = [per_example_file(Path(folder), when) for when in ("before", "after")]
    if not all(path.is_file() for path in paths):
        return []
    before, after = map(files.read_object, paths)
    changes = []
    for name in metrics():
        if name not in before or name not in after:
            continue
        try:
            change = paired_change(before[name], after[name])
        except (ValueError, TypeError, AttributeError):  # other rows, or a file that somebody else wrote
            continue
        if math.isfinite(change.low) and math.isfinite(change.high):
            rows = len(after[name])
            changes.append(Skill(metric_of(name).label, name, rows, **change._asdict()))
    return changes


def shown_changes(changes: Sequence[Skill], skills: Sequence[Skill]) -> list[Skill]:
    """What the sentence and the dot plot speak of: the task's metrics, and beside it each skill in place of
    their mean.
    """
    if not skills:
        return list(changes)
    return [*(change for change in changes if change.metric not in RETENTION), *skills]


def verdict(changes: Sequence[Skill]) -> str:
    """What was gained and lost and by how much, the largest first; empty where nothing was measured."""
    if not changes:
        return ""
    gained, lost, unclear = [], [], 0
    for change in sorted(changes, key=lambda change: (not _is_share(change), -abs(change.difference))):
        if change.better is None or metric_of(change.metric).better is None:
            unclear += 1
        elif change.better:
            gained.append(change.phrase())
        else:
            lost.append(change.phrase())
    sentences = [f"Gained: {_listed(gained)}.", f"Lost: {_listed(lost)}."]
    if unclear:
        sentences.append(f"{unclear} of {len(changes)} measures show no change beyond chance.")
    return " ".join(sentences)


def _is_share(change: Skill) -> bool:
    return metric_of(change.metric).is_share


def _listed(phrases: Sequence[str]) -> str:
    if not phrases:
        return "nothing that these rows can tell"
    if len(phrases) > NAMED:
        return f"{'; '.join(phrases[:NAMED])}; and {len(phrases) - NAMED} more"
    return "; ".join(phrases)


# ---------------------------------------------------------------------------------------------- dot plot


def dot_plots(changes: Sequence[Skill]) -> list[dict[str, Any]]:
    """Changes as dots with their intervals, sorted by change, the worst last: shares in points, and what has
    other units apart.

    Each {caption, zero, dots: [{label, at, low, high, text, kind}]}: places in percent
    of the width, kind good, bad or soft. Right is better.
    """
    plots = []
    for caption, shares in ((POINTS, True), (UNITS, False)):
        some = []
        for change in changes:
            if _is_share(change) == shares and metric_of(change.metric).better:
                some.append(change)
        if some:
            plots.append(_dot_plot(caption, some))
    return plots


def _dot_plot(caption: str, changes: Sequence[Skill]) -> dict[str, Any]:
    """The axis shows improvement: of a metric where lower is better, the change with its sign turned."""
    lines = []
    for change in changes:
        low, middle, high = change.low, change.difference, change.high
        if not metric_of(change.metric).higher_is_better:
            low, middle, high = -high, -middle, -low
        lines.append((middle, low, high, change))
    lines.sort(key=lambda line: -line[0])
    least, most = min(0.0, *(line[1] for line in lines)), max(0.0, *(line[2] for line in lines))
    width = (most - least) or 1.0

    def place(value: float) -> float:
        return round(3 + 94 * (value - least) / width, 2)  # a dot at either end is drawn whole

    dots = []
    for middle, low, high, change in lines:
        kind = {True: "good", False: "bad", None: "soft"}[change.better]
        text = format_difference(change.metric, change.difference, unit=True)
        places = {"at": place(middle), "low": place(low), "high": place(high)}
        dots.append({"label": change.label, "text": text, "kind": kind, **places})
    return {"caption": caption, "zero": place(0.0), "dots": dots}


# ------------------------------------------------------------------------------------------- conditions

SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
FIELDS = ("change", "before", "after", "low", "high")
FORM = re.compile(r"\s*([\w@][\w@/ -]*?)(?:\.(\w+))?\s*(<=|>=|<|>)\s*([-−+]?[\d.]+(?:e-?\d+)?)\s*%?\s*")
SHORT = {"retention": "retention_accuracy", "refusals": "refused_unsafe", "over_refusals": "refused_safe"}


@dataclass(frozen=True)
class Condition:
    """'retention < -2': a metric (or one of its parts, or a skill), what of it, and a number: shares in
    points, all else in their unit.
    """

    text: str
    name: str
    field: str  # one of FIELDS
    sign: str
    number: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises RecipeError where it has another form."""
        match = FORM.fullmatch(text)
        if match is None:
            raise RecipeError(
                f"--fail-if: cannot read {text!r}; write a metric, < or > and a number, such as"
                " 'retention < -2'"
            )
        name, field, sign, number = match.groups()
        field = field or "change"
        if field not in FIELDS:
            raise RecipeError(f"--fail-if: {text!r}: {field!r} is none of {', '.join(FIELDS)}")
        name = former_metrics().get(name, SHORT.get(name, name))
        return cls(text, name, field, sign, float(number.replace("−", "-")))

    def holds(self, result: Mapping[str, Any]) -> bool:
        """Of what `luthier.inspect` gives. Raises RecipeError where the metric was not measured."""
        measured = values_of(result, self.name)
        if self.field not in measured:
            names = {*result["tuned"]["metrics"], *(skill["skill"] for skill in result["skills"])}
            hint = did_you_mean(self.name, sorted(names))
            raise RecipeError(f"--fail-if: '{self.name}' has no {self.field} in this check-up{hint}")
        return SIGNS[self.sign](measured[self.field], self.number)


def values_of(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """Before, after and change of a metric or skill, and the ends of its interval where it has one; shares in
    percent and points.
    """
    wholes = [one for one in result.get("changes", ()) if name in (one["metric"], one["skill"])]
    parts = [one for one in result.get("skills", ()) if name == one["skill"]]
    for one in (*wholes, *parts):
        factor = _factor(one["metric"])
        values = {"change": one["difference"], **{key: one[key] for key in FIELDS[1:]}}
        return {key: factor * value for key, value in values.items()}
    before, after = (result[who]["metrics"].get(name) for who in ("base", "tuned"))
    if before is None or after is None:
        return {}
    factor = _factor(name)
    return {"before": factor * before, "after": factor * after, "change": factor * (after - before)}


def _factor(name: str) -> float:
    """From the unit of a metric to that of conditions, which write shares in percent."""
    return 100.0 if metric_of(name).is_share else 1.0
