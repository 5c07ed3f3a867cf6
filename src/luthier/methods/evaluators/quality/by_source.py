"""Held-out loss and accuracy of each source of the rows (column `source`), side by side."""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.evaluators._base import PerExample, keep, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("source_accuracy", "sequence accuracy of a source", unit="%", better="higher", rank=6),
        Metric("source_loss", "loss of a source", better="lower", rank=6),
    ],
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    use_when="rows come from several tasks and you want to see each one: what a mixture gives to whom.",
    costs="one forward pass over the held-out rows, shared with `loss` and `accuracy`.",
)
class BySource(PerExample):
    """`source_accuracy/NAME`, `source_loss/NAME`: as `accuracy` and `loss`, over the rows of one source."""

    asks: ClassVar[frozenset[str]] = frozenset({"loss", "first"})

    column: str = "source"  # column that says where a row is from

    def summarize(self, stats, roles, rows, folder, when):
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
        right: dict[str, dict[str, float]] = defaultdict(dict)
        for row in liked(rows):
            one = stats[str(row["id"])]
            source = str(row.get(self.column))
            correct = float(one.first == one.tokens)
            right[source][str(row["id"])] = correct
            for place, value in enumerate((1.0, correct, one.loss, float(one.tokens))):
                sums[source][place] += value
        keep(folder, when, **{f"source_accuracy/{name}": values for name, values in right.items()})
        out = {}
        for name, (count, correct, loss, tokens) in sorted(sums.items()):
            out[f"source_accuracy/{name}"] = correct / count
            if tokens:
                out[f"source_loss/{name}"] = loss / tokens
        return out
