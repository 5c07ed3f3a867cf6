"""The most different rows: from a first one on, always the row farthest from all chosen ones (k-center
greedy).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import embed, texts_of
from luthier.registry import stage


@stage(
    example={"n": 2},
    paper="arXiv:1708.00489",
    requires=[LOGPROBS],
    use_when="a few rows are to cover all that there is, whatever their quality: a baseline of selection.",
    costs="one forward pass for embeddings, and one product with all rows for each chosen one.",
)
class KCenter(Stage):
    """`n` rows, each the farthest from those before it; the first is nearest to the mean."""

    n: Annotated[int, Field(ge=1)] = 1000  # rows that are kept
    part: Literal["prompt", "row"] = "row"  # what is embedded: the prompt, or the answer as well
    encoder: str | None = None  # a sentence encoder (folder or hub name); null: the policy's last layer
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows per forward pass

    def __call__(self, rows, roles):
        rows = list(rows)
        vectors = embed(roles, texts_of(roles, rows, self.part), self.encoder, self.batch_size)
        chosen = farthest(vectors, self.n)
        return self.drop(roles, rows, chosen, f"they are not among the {self.n} most different rows")


def farthest(vectors: torch.Tensor, n: int) -> list[int]:
    """Places of n rows by greedy k-center. vectors: [N, d]."""
    first = int((vectors - vectors.mean(0)).norm(dim=-1).argmin())
    chosen, distances = [first], (vectors - vectors[first]).norm(dim=-1)
    while len(chosen) < min(n, len(vectors)):
        place = int(distances.argmax())
        chosen.append(place)
        distances = torch.minimum(distances, (vectors - vectors[place]).norm(dim=-1))
    return chosen
