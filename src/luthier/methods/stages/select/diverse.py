"""Score first, then diversity: walks through the rows from the best score on, and takes a row unless a row
that was taken is too much like it.

The Repr Filter of DEITA (Liu et al., 2024): the cosine of a row's embedding to its nearest chosen row must
be below `threshold`. With a threshold above 1 it is the top of the scores.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import embed, number, texts_of
from luthier.registry import Range, stage


@stage(
    example={"n": 3, "by": [], "threshold": 1.01},
    paper="arXiv:2312.15685",
    row="deita",
    requires=[LOGPROBS],
    use_when="rows have scores, are many and repeat each other: a few thousand good and different ones are"
    " often as good as all.",
    costs="one forward pass for embeddings, and a product of each row with those that were chosen.",
    covers="the walk by score, with the least distance between chosen rows.",
    tests=["methods/stages/select/test_choice.py::test_diverse_is_the_brute_force_filter"],
)
class Diverse(Stage):
    """At most `n` rows, best first, each with a cosine below `threshold` to all chosen ones."""

    n: Annotated[int, Field(ge=1)] = 6000  # rows at most
    # columns of numbers whose product is the score (stage likert); empty: the order of the rows
    by: list[str] = field(default_factory=lambda: ["quality"])
    threshold: Annotated[float, Range(0.7, 1.0)] = 0.9  # cosine from which two rows are alike
    part: Literal["prompt", "row"] = "row"  # what is embedded: the prompt, or the answer as well
    encoder: str | None = None  # a sentence encoder (folder or hub name); null: the policy's last layer
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows per forward pass

    def __call__(self, rows, roles):
        rows = list(rows)
        scores = [number(row, self.by, self.name) for row in rows]
        vectors = embed(roles, texts_of(roles, rows, self.part), self.encoder, self.batch_size)
        order = sorted(range(len(rows)), key=lambda place: -scores[place])
        chosen = far_apart(vectors, order, self.n, self.threshold)
        return self.drop(roles, rows, chosen, "they are like rows with a better score, or beyond the budget")


def far_apart(vectors: torch.Tensor, order: list[int], n: int, threshold: float) -> list[int]:
    """Places in this order, without those whose cosine to one before them reaches the threshold.

    vectors: [N, d] of length 1.
    """
    chosen: list[int] = []
    table = torch.empty(min(n, len(order)), vectors.shape[-1])
    for place in order:
        if len(chosen) == n:
            break
        nearest = -1.0
        if chosen:
            nearest = float((table[: len(chosen)] @ vectors[place]).max())
        if nearest < threshold:
            table[len(chosen)] = vectors[place]
            chosen.append(place)
    return chosen
