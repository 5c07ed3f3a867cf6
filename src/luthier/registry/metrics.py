"""Every metric by name: what evaluators declare, and what a run costs. One place for labels, units,
directions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from luthier.registry.discover import cards
from luthier.registry.words import Metric

COSTS = {  # what a run costs, out of its report's stats
    "trained": Metric("trained", "trainable parameters", better="lower"),
    "peak_memory_mb": Metric("peak_memory_mb", "peak memory (MB)", better="lower"),
    "seconds": Metric("seconds", "training time (s)", better="lower"),
    "tokens_per_second": Metric("tokens_per_second", "tokens/s", better="higher"),
}


@cache
def metrics() -> dict[str, Metric]:
    """Name -> metric, of every evaluator in turn; costs last."""
    out: dict[str, Metric] = {}
    own = cards("evaluator", own=True)
    others = [card for card in cards("evaluator") if card not in own]
    for card in own + others:  # what ours are called, no other package changes
        for declared in card.metrics:
            out.setdefault(declared.name, declared)
    ordered = sorted(out.values(), key=lambda m: (m.rank, m.name))
    return {m.name: m for m in ordered} | COSTS


@cache
def former_metrics() -> dict[str, str]:
    """Name that a metric had in version 0.1 -> its name."""
    return {m.former: m.name for m in metrics().values() if m.former}


def metric(name: str) -> Metric:
    """The metric of this name; one that nobody declared is called by its own.

    'family/part' is a part of a metric. A name with parentheses is a number of a front, made of others.
    """
    if "(" in name:
        return Metric(name, name, better="lower" if name.startswith("sparsity") else "higher")
    family, _, part = name.partition("/")
    family = former_metrics().get(family, family)
    declared = metrics().get(family) or Metric(family, family.replace("_", " "))
    return replace(declared, label=f"{declared.label}: {part}") if part else declared


def evaluator_of(name: str) -> str | None:
    """The evaluator that measures a metric; None where none declares it."""
    family = name.partition("/")[0]
    family = former_metrics().get(family, family)
    for card in cards("evaluator"):
        if any(declared.name == family for declared in card.metrics):
            return card.name
    return None
