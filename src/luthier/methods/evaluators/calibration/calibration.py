"""Calibration: how well the probability of the most likely token matches how often it is right (Guo et al.).

The expected calibration error over the supervised tokens: tokens are binned by the probability of the most
likely one; the gap between this probability and its accuracy is averaged, weighted by bin size.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.evaluators._base import Evaluator, batches, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Artifact, Metric, evaluator
from luthier.storage import files


@evaluator(
    metrics=[
        Metric("calibration_error", "calibration error (ECE)", unit="%", better="lower", rank=20),
    ],
    artifacts=[Artifact("calibration-*.json")],
    paper="arXiv:1706.04599",
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    use_when="probabilities of the model are used for decisions and must match how often it is right.",
    costs="one forward pass over the held-out rows, with whole distributions.",
)
class Calibration(Evaluator):
    """`calibration_error`: 0 is perfect. Writes calibration-<when>.json: [tokens, mean confidence, accuracy]
    of each bin.
    """

    bins: Annotated[int, Field(ge=2)] = 15  # number of bins of equal width
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        sure, right = [], []
        for batch in batches(roles, liked(rows), self.batch_size):
            logprobs, ids = roles.policy.outputs(batch).top(1)
            sure.append(logprobs.squeeze(1).double().exp())
            right.append((ids.squeeze(1) == batch.labels[batch.targets]).double())
        if not sure:
            return {}
        table = self.table(torch.cat(sure), torch.cat(right))
        if when != "during":
            files.write_json(folder / f"calibration-{when}.json", table)
        total = sum(n for n, _, _ in table)
        return {"calibration_error": sum(n / total * abs(s - r) for n, s, r in table)}

    def table(self, sure: torch.Tensor, right: torch.Tensor) -> list[list[float]]:
        """[T], [T] -> [tokens, mean confidence, share right] of each bin that holds any."""
        place = (sure * self.bins).long().clamp(max=self.bins - 1)
        n, s, r = (
            torch.zeros(self.bins, dtype=torch.float64, device=sure.device).index_add(0, place, x)
            for x in (torch.ones_like(sure), sure, right)
        )
        return [[k, a / k, b / k] for k, a, b in zip(n.tolist(), s.tolist(), r.tolist()) if k]
