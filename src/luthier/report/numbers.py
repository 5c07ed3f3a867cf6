"""Numbers as people read them: what a metric is called, which way is better, and the run in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Metric:
    """How a metric is told."""

    label: str  # "{on}" becomes what it was measured on
    share: bool = False  # shown in percent, changes in points
    up: bool | None = None  # is more better? None: neither


METRICS = {
    "loss": Metric("loss on {on}", up=False),
    "accuracy": Metric("exact on {on}", share=True, up=True),
    "token_accuracy": Metric("tokens right on {on}", share=True, up=True),
    "preference_accuracy": Metric("prefers the better answer", share=True, up=True),
    "exact_match": Metric("written answers exact", share=True, up=True),
    "generated_reward": Metric("reward of written answers", up=True),
    "goal": Metric("goal", up=True),
    "generated_tokens": Metric("tokens of written answers"),
    "ranking_accuracy": Metric("ranks pairs right", share=True, up=True),
    "reference_ranking_accuracy": Metric("the reference ranks pairs right", share=True),
    "reward_accuracy": Metric("likes the better answer more than the reference does", share=True, up=True),
    "reward_margin": Metric("margin of the implicit reward, nats", up=True),
    "chosen_drift": Metric("the better answer became likelier by, nats", up=True),
    "rejected_drift": Metric("the worse answer became likelier by, nats"),
    "length_correlation": Metric("implicit reward goes with length"),
    "length_ratio": Metric("length of what it prefers, by the better answers'"),
    "calibration_error": Metric("calibration error on {on}", share=True, up=False),
    "retention_loss": Metric("loss elsewhere", up=False),
    "retention_accuracy": Metric("exact elsewhere", share=True, up=True),
    "distinct_2": Metric("different pairs of tokens in samples", share=True),
    "distinct_answers": Metric("different answers to one prompt", share=True),
    "answer_length": Metric("tokens of a sampled answer"),
    "refused_unsafe": Metric("unsafe requests declined", share=True, up=True),
    "refused_safe": Metric("safe requests declined", share=True, up=False),
}


@dataclass(frozen=True)
class MetricRow:
    """One metric, before and after."""

    name: str
    label: str
    before: str
    after: str
    change: str
    better: bool | None  # None: no change worth the word, or neither way is better


def says(name: str, on: str = "held-out rows") -> Metric:
    """How a metric is told; one that nobody described keeps its own name."""
    if "(" in name:  # of a front: what it is made of is its name
        return Metric(name, up=not name.startswith("sparsity"))
    family, _, skill = name.partition("/")
    known = METRICS.get(family, Metric(family.replace("_", " ")))
    label = known.label.format(on=on) + (f": {skill}" if skill else "")
    return Metric(label, known.share, known.up)


def number(x: float | None, share: bool = False) -> str:
    """1234.5 -> '1,234', 0.0123 -> '0.0123', a share 0.981 -> '98.1%'; nothing for what was not measured."""
    if x is None:
        return ""
    if not math.isfinite(x):
        return str(x)
    if share:
        return f"{100 * x:.1f}%"
    if x and abs(x) < 0.1:
        return f"{x:.2g}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) >= 10 else f"{x:.2f}"


def lines(report: Any) -> list[MetricRow]:
    """Every metric that was measured, in the order of METRICS, skills last."""
    on = report.stats.get("measured_on", "held-out rows")
    names = list(dict.fromkeys([*report.before, *report.after]))
    order = {name: i for i, name in enumerate(METRICS)}
    names.sort(key=lambda n: (order.get(n.partition("/")[0], len(order)), "/" in n, n))
    return [line(name, report.before.get(name), report.after.get(name), on) for name in names]


def line(name: str, before: float | None, after: float | None, on: str = "held-out rows") -> MetricRow:
    """One metric before and after. The change is of the numbers as measured, not as rounded."""
    how = says(name, on)
    change, better = "", None
    if before is not None and after is not None and math.isfinite(after - before):
        gap = after - before
        size = f"{abs(gap) * 100:.1f}" if how.share else number(abs(gap))
        flat = abs(gap) < (5e-4 if how.share else 5e-3 * max(1e-9, abs(before)))
        change = "same" if gap == 0 else f"{'+' if gap > 0 else '−'}{size}{' points' if how.share else ''}"
        better = None if how.up is None or flat else (gap > 0) == how.up
    return MetricRow(name, how.label, number(before, how.share), number(after, how.share), change, better)


def headline(report: Any) -> str:
    """The run in one sentence: learned what, at what price. Says nothing that was not measured."""
    parts = [p for p in (_loss(report), _right(report), _goals(report), _price(report)) if p]
    if not report.stats.get("steps", len(report.losses)):
        return "Nothing was trained" + ("; " + "; ".join(parts) if parts else "") + "."
    said = "; ".join(parts) or "Nothing was measured before and after"
    return said[0].upper() + said[1:] + "."


def _loss(report: Any) -> str:
    before, after = report.before.get("loss"), report.after.get("loss")
    on = (
        "held-out loss"
        if report.stats.get("measured_on", "held-out rows") == "held-out rows"
        else "loss on the training rows"
    )
    return f"{on} {number(before)} → {number(after)}" if before is not None and after is not None else ""


def _right(report: Any) -> str:
    for name, what in (
        ("generated_reward", "mean reward {b} → {a}"),
        ("exact_match", "{a} of written answers exact (before: {b})"),
        ("preference_accuracy", "the better answer is preferred in {a} of pairs (before: {b})"),
        ("accuracy", "{a} of completions exact (before: {b})"),
    ):
        both = report.before.get(name), report.after.get(name)
        if None not in both and any(both):  # texts that nobody could guess whole are no news
            share = says(name).share
            return what.format(b=number(both[0], share), a=number(both[1], share))
    return ""


def _goals(report: Any) -> str:
    both = {
        name[5:]: (report.before[name], report.after[name])
        for name in report.after
        if name[:5] == "goal/" and name in report.before
    }
    return ", ".join(f"{goal} {number(b)} → {number(a)}" for goal, (b, a) in both.items())


def _price(report: Any) -> str:
    if "retention_accuracy" in report.before and "retention_accuracy" in report.after:
        points = 100 * (report.after["retention_accuracy"] - report.before["retention_accuracy"])
        if abs(points) < 0.05:
            return "other skills kept"
        return f"other skills {'gained' if points > 0 else 'lost'} {abs(points):.1f} points"
    if "retention_loss" in report.before and "retention_loss" in report.after:
        return (
            f"loss elsewhere {number(report.before['retention_loss'])} →"
            f" {number(report.after['retention_loss'])}"
        )
    return ""


def cost(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the run took, as (what, how much); only what was measured."""
    if stats.get("tokens") and stats.get("seconds"):
        yield "training speed", f"{stats['tokens'] / stats['seconds']:,.0f} tokens/s"
    if stats.get("seconds"):
        yield "time in steps", duration(stats["seconds"])
    if stats.get("peak_memory_mb"):
        mb = stats["peak_memory_mb"]
        yield "peak memory", f"{mb / 1024:.2f} GB" if mb >= 1024 else f"{mb:.0f} MB"
    if stats.get("all"):
        yield "trained share", f"{100 * stats.get('moving', 0) / stats['all']:.3g}% of {count(stats['all'])}"
    if stats.get("steps"):
        yield "steps", f"{stats['steps']:,}"
    if stats.get("tokens"):
        yield "tokens read", f"{stats['tokens']:,}"
    if stats.get("supervised"):
        yield "tokens learned from", f"{stats['supervised']:,}"


def count(n: float) -> str:
    """3400000 -> '3.4M'."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def answers(folder: Any) -> list[dict]:
    """Written answers before and after, matched by row: {prompt, expected, before, after, score_before,
    score_after}. Of a run that goes on, `after` is what was written last."""
    said: dict[str, dict[str, dict]] = {}
    last = "after" if (Path(folder) / "samples-after.jsonl").is_file() else "during"
    for when, file in (("before", "before"), ("after", last)):
        path = Path(folder) / f"samples-{file}.jsonl"
        if path.is_file():
            # splitlines also cuts at marks that a model may have written
            lines = path.read_text(encoding="utf-8").split("\n")
            for i, text in enumerate(line for line in lines if line):
                row = json.loads(text)
                said.setdefault(str(row.get("id", i)), {})[when] = row
    out = []
    for both in said.values():
        one = both.get("after") or both["before"]
        before, after = both.get("before", {}), both.get("after", {})
        out.append(
            {
                "prompt": one.get("prompt", ""),
                "expected": one.get("expected"),
                "before": before.get("answer"),
                "after": after.get("answer"),
                "score_before": before.get("score"),
                "score_after": after.get("score"),
            }
        )
    return out
