"""Sorts completions into quality bins by their scores: every completion becomes a row with its bin, 0 for the
worst.

Of a row with several completions the best gets the last bin and the worst the first, those between by rank.
Rows with a single completion are compared with each other: by their distinct scores if there are no more of
these than bins (good and bad), else by quantiles.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.stages._base import Stage, pick
from luthier.registry import Column, stage

QUALITY_BIN = Column("quality_bin", says="rows with a `quality_bin` (stage buckets)", former="bucket")


@stage(
    paper="arXiv:2310.00819",
    row="meet",
    requires=[COMPLETIONS, SCORES],
    provides=[QUALITY_BIN],
    use_when="completions have scores and tuner `control` is to learn from good and bad ones.",
    costs="nothing beside reading the scores.",
)
class Buckets(Stage):
    """Completions with a score become rows with a `quality_bin`."""

    asks_model = False

    buckets: Annotated[int, Field(ge=2)] = 2  # number of bins

    def __call__(self, rows, roles):
        alone = sorted({float(r["scores"][0]) for r in rows if len(r["completions"]) == 1})
        each = torch.tensor(
            [float(r["scores"][0]) for r in rows if len(r["completions"]) == 1], dtype=torch.float64
        )
        cuts = (
            torch.quantile(each, torch.arange(1, self.buckets, dtype=torch.float64) / self.buckets).tolist()
            if len(alone) > self.buckets
            else []
        )
        out, same = [], 0
        for row in rows:
            scores = [float(s) for s in row["scores"]]
            if len(scores) == 1:
                place = (
                    sum(scores[0] >= c for c in cuts)
                    if cuts
                    else self.spread(alone.index(scores[0]), len(alone))
                )
                out.append({**row, "quality_bin": place})
                continue
            levels = sorted(set(scores))
            same += len(levels) < 2
            for i, score in enumerate(scores if len(levels) > 1 else []):
                out.append(
                    {
                        **pick(row, [i]),
                        "id": f"{row['id']}/{i}",
                        "quality_bin": self.spread(levels.index(score), len(levels)),
                    }
                )
        self.left(roles, same, len(rows), "all their completions have the same score")
        return out

    def spread(self, place: int, levels: int) -> int:
        """The bucket of one of so many levels; of a single one the last."""
        return self.buckets - 1 if levels == 1 else round(place / (levels - 1) * (self.buckets - 1))
