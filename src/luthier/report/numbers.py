"""Numbers as people read them: what a metric is called, which way is better, and a run in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.errors import Damaged
from luthier.methods.evaluators._base import paired_change, per_example_file
from luthier.registry import former_metrics, metrics
from luthier.registry import metric as metric_of
from luthier.storage import files

HELD_OUT = "held-out rows"
TRAINING_ROWS = "training rows"  # what metrics are measured on where no rows are held out


def measured(values: Mapping[str, Any], name: str) -> Any:
    """The value of a metric under its name, or under the one it had in version 0.1; None where there is
    none.
    """
    for former, now in former_metrics().items():
        if now == name and former in values:
            return values[former]
    return values.get(name)


# ---------------------------------------------------------------------------------------------- formats


def format_number(x: float | None, share: bool = False) -> str:
    """1234.5 -> '1,234', 0.0123 -> '0.0123', a share 0.981 -> '98.1%'; nothing for what was not measured."""
    if x is None:
        return ""
    if not math.isfinite(x):
        return str(x)
    if share:
        return f"{100 * x:.1f}%"
    size = abs(x)
    if 0 < size < 0.1:
        return f"{x:.2g}"
    if size >= 1000:
        return f"{x:,.0f}"
    if size >= 10:
        return f"{x:.3g}"
    return f"{x:.2f}"


def format_metric(name: str, value: float | None) -> str:
    """A value of a metric: in percent where it is a share, short where it counts parameters."""
    if value is None:
        return ""
    metric = metric_of(name)
    if metric.name == "trained":
        return format_count(value)
    return format_number(value, metric.is_share).replace("-", "−", 1)


def format_difference(name: str, gap: float, unit: bool = False) -> str:
    """A difference of two values of a metric, with its sign; of shares in points, which `unit` writes
    behind.
    """
    size = format_number(abs(gap))
    if metric_of(name).is_share:
        size = f"{abs(gap) * 100:.1f}" + " points" * unit
    if gap > 0:
        return f"+{size}"
    return f"−{size}" if gap < 0 else size


def format_count(n: float) -> str:
    """3400000 -> '3.4M'."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.0f}"


def format_duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s"


# ------------------------------------------------------------------------------------------- before and after


@dataclass(frozen=True)
class MetricRow:
    """One metric, before and after."""

    name: str
    label: str
    before: str
    after: str
    change: str
    better: bool | None  # None: no change worth the word, or neither way is better
    interval: str = ""  # of the change at 95 %, where the metric is a mean over rows


def metric_rows(report: Any) -> list[MetricRow]:
    """Every metric that was measured in the order of the registry; parts ('retention_accuracy/chat') last."""
    order, former = list(metrics()), former_metrics()

    def place(name: str) -> tuple[bool, int, str]:
        family = name.partition("/")[0]
        family = former.get(family, family)
        return "/" in name, order.index(family) if family in order else len(order), name

    intervals = change_intervals(Path(getattr(report, "folder", None) or "."))
    rows = []
    for name in sorted({*report.before, *report.after}, key=place):
        row = metric_row(name, report.before.get(name), report.after.get(name))
        if row.change and name in intervals:
            row = replace(row, interval=intervals[name])
        rows.append(row)
    return rows


def change_intervals(folder: Path) -> dict[str, str]:
    """'-0.52 to -0.31' for each metric of a run that was saved row by row before and after."""
    paths = [per_example_file(folder, when) for when in ("before", "after")]
    if not all(path.is_file() for path in paths):
        return {}
    before, after = map(files.read_object, paths)
    intervals = {}
    for name in before.keys() & after.keys():
        try:
            change = paired_change(before[name], after[name])
        except (ValueError, TypeError, AttributeError):  # other rows, or a file that somebody else wrote
            continue
        if math.isfinite(change.low) and math.isfinite(change.high):
            low, high = format_difference(name, change.low), format_difference(name, change.high)
            intervals[name] = f"{low} to {high}"
    return intervals


def metric_row(name: str, before: float | None, after: float | None) -> MetricRow:
    """One metric before and after. The change is of the numbers as measured, not as rounded."""
    metric = metric_of(name)
    change, better = "", None
    if before is not None and after is not None and math.isfinite(after - before):
        gap = after - before
        change = format_difference(name, gap, unit=True) if gap else "same"
        least = 5e-3 * max(1e-9, abs(before))  # a smaller change is neither better nor worse
        if metric.is_share:
            least = 5e-4
        if metric.better is not None and abs(gap) >= least:
            better = (gap > 0) == metric.higher_is_better
    return MetricRow(
        name, metric.label, format_metric(name, before), format_metric(name, after), change, better
    )


def split_rows(
    rows: list[MetricRow], skills: Sequence[Any] = ()
) -> tuple[list[MetricRow], dict[str, list[MetricRow]]]:
    """Whole metrics, and the parts of each metric under its label: a table of their own. skills: those that
    stand in a table with intervals, in place of the parts of retention.
    """
    whole: list[MetricRow] = []
    parts: dict[str, list[MetricRow]] = {}
    for row in rows:
        family, _, part = row.name.partition("/")
        if part:
            parts.setdefault(metric_of(family).label, []).append(replace(row, label=part))
        else:
            whole.append(row)
    if skills:
        parts.pop(metric_of("retention_accuracy").label, None)
    return whole, parts


# -------------------------------------------------------------------------------------------- in one sentence

# the first of these that was measured stands in the headline
QUALITY = ("generated_reward", "exact_match", "preference_accuracy", "chrf", "accuracy")


def headline(report: Any) -> str:
    """The run in one sentence: quality, and retention. Nothing that was not measured."""
    on = report.stats.get("measured_on", HELD_OUT)
    phrases = [
        *_phrase(report, "loss", "held-out loss" if on == HELD_OUT else f"loss on the {on}"),
        *_quality(report),
        *_rewards(report),
        *(_phrase(report, "retention_accuracy") or _phrase(report, "retention_loss")),
    ]
    if not report.stats.get("steps", len(report.losses)):
        return "; ".join(["Nothing was trained", *phrases]) + "."
    sentence = "; ".join(phrases) or "no metric was measured before and after"
    return sentence[0].upper() + sentence[1:] + "."


def _phrase(report: Any, name: str, label: str = "") -> list[str]:
    """['exact match 12.5% → 46.9%'], or nothing."""
    before, after = measured(report.before, name), measured(report.after, name)
    if before is None or after is None:
        return []
    label = label or metric_of(name).label.partition(" (")[0]
    return [f"{label} {format_metric(name, before)} → {format_metric(name, after)}"]


def _quality(report: Any) -> list[str]:
    for name in QUALITY:
        phrase = _phrase(report, name)
        # that no text was guessed whole, before or after, is no news
        if phrase and (measured(report.before, name) or measured(report.after, name)):
            return phrase
    return []


def _rewards(report: Any) -> list[str]:
    phrases = []
    for name in report.after:
        family, _, goal = name.partition("/")
        if family == "goal":
            phrases += _phrase(report, name, goal)
    return phrases


def row_counts(stats: Mapping[str, Any]) -> str:
    """'60 rows read: 54 for training, 6 held out'; empty where they were not counted."""
    counts = stats.get("row_counts")
    if not counts:
        return ""
    sentence = (
        f"{counts['read']:,} rows read: {counts['training']:,} for training, {counts['held_out']:,} held out"
    )
    if counts["unreadable"]:
        sentence += f", {counts['unreadable']:,} that cannot be read"
    if "data_rows" in stats and stats["data_rows"] != counts["training"]:
        sentence += (
            f"; {stats['data_rows']:,} rows are trained on, after unusable ones, stages and the cutting of"
            " long texts"
        )
    return sentence


def cost(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the run took, as (what, how much); only what was measured."""
    tokens, seconds = stats.get("tokens"), stats.get("seconds")
    if stats.get("all"):
        trainable = stats.get("moving", 0)
        yield "trainable parameters", format_trainable(trainable, stats["all"])
    if stats.get("steps"):
        yield "steps", f"{stats['steps']:,}"
    if tokens:
        yield "tokens", f"{tokens:,}"
    if stats.get("supervised"):
        yield "supervised tokens", f"{stats['supervised']:,}"
    if seconds:
        yield "training time", format_duration(seconds)
    if tokens and seconds:
        yield "throughput", f"{tokens / seconds:,.0f} tokens/s"
    if stats.get("peak_memory_mb"):
        yield "peak memory", format_megabytes(stats["peak_memory_mb"])


def format_megabytes(mb: float) -> str:
    """512 -> '512 MB', 1536 -> '1.50 GB'."""
    if mb < 1024:
        return f"{mb:.0f} MB"
    return f"{mb / 1024:.2f} GB"


def format_trainable(trainable: float, total: float) -> str:
    """'152K of 3.95M (3.83%)'."""
    return f"{format_count(trainable)} of {format_count(total)} ({100 * trainable / total:.3g}%)"


# ---------------------------------------------------------------------------------------------- generations


def generations(folder: Any) -> list[dict]:
    """Generated texts before and after, matched by row: {id, prompt, expected, before, after, score_before,
    score_after}, of rows with images also `images`; of a conversation's prompt the last user message.

    Of a run that goes on, `after` is what was generated last.
    """
    before, during, after = (Path(folder) / f"samples-{when}.jsonl" for when in ("before", "during", "after"))
    if not after.is_file():
        after = during
    by_row: dict[str, dict[str, dict]] = {}
    for when, path in (("before", before), ("after", after)):
        if not path.is_file():
            continue
        for i, row in enumerate(_samples(path)):
            if row is None:
                continue
            by_row.setdefault(str(row.get("id", i)), {})[when] = row
    return list(map(_before_and_after, by_row.values()))


def damaged_generations(folder: Any) -> list[str]:
    """A sentence for each file of generated texts that is damaged: `generations` leaves out what cannot be
    read.
    """
    sentences = []
    for when in ("before", "during", "after"):
        path = Path(folder) / f"samples-{when}.jsonl"
        if not path.is_file():
            continue
        damaged = sum(row is None for row in _samples(path))
        if damaged:
            sentences.append(f"{path.name} is damaged: {damaged:,} of its lines cannot be read")
    return sentences


def _samples(path: Path) -> Iterator[dict | None]:
    """The rows of a file of generated texts; None for each damaged line, and for a file that is no text."""
    try:
        text = files.read_text(path)
    except Damaged:
        yield None
        return
    for line in text.split("\n"):  # splitlines would also cut at marks that a model may have written
        if not line.strip():
            continue
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        yield row if isinstance(row, dict) else None


def _before_and_after(both: dict[str, dict]) -> dict[str, Any]:
    """One row of `generations`."""
    before, after = both.get("before", {}), both.get("after", {})
    row = after or before
    images = {"images": row["images"]} if row.get("images") else {}
    return {
        **images,
        "id": row.get("id"),
        "prompt": row.get("question", row.get("prompt", "")),
        "expected": row.get("expected"),
        "before": before.get("answer"),
        "after": after.get("answer"),
        "score_before": before.get("score"),
        "score_after": after.get("score"),
    }
