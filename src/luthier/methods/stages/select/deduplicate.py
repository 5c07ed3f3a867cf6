"""Leaves out rows that say what another row says: exact copies, and near copies by MinHash.

Texts are compared by their shingles of `words` words in lower case; two rows are near copies where the
Jaccard similarity of their shingles is estimated at `threshold` or more (Broder, 1997; datasketch's
MinHashLSH). The first of several stays.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.data.split import media_of
from luthier.errors import RecipeError
from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import texts_of
from luthier.registry import stage

WORD = re.compile(r"\w+")


@stage(
    example={"near": False},
    use_when="rows come from several sources or were generated: copies make a model repeat them.",
    costs="some hundred hashes for each row; `near` needs `pip install luthier[data]`.",
)
class Deduplicate(Stage):
    """One row of each group of copies."""

    asks_model = False

    near: bool = True  # are near copies left out as well?
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8  # Jaccard similarity of a near copy
    words: Annotated[int, Field(ge=1)] = 5  # of a shingle
    permutations: Annotated[int, Field(ge=16)] = 128  # hashes of a signature
    part: Literal["prompt", "row"] = "row"  # what is compared: the prompt, or the answer as well

    def __call__(self, rows, roles):
        rows = list(rows)
        texts = texts_of(roles, rows, self.part)
        images = [tuple(media_of(row)) for row in rows]  # a question about another one is no copy
        first: dict[tuple, int] = {}
        chosen = []
        for place, text in enumerate(texts):
            key = (" ".join(WORD.findall(text.lower())) or text, images[place])
            if key not in first:
                first[key] = place
                chosen.append(place)
        if self.near:
            chosen = self.without_near_copies(chosen, texts, images)
        return self.drop(roles, rows, chosen, "they are copies of other rows, or nearly")

    def without_near_copies(self, places: list[int], texts: list[str], images: list[tuple]) -> list[int]:
        """The places whose text is like none before it with the same images."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise RecipeError(
                "stage 'deduplicate' finds near copies with datasketch, which is not installed: pip install"
                " 'luthier[data]', or set near: false"
            ) from None
        index = MinHashLSH(threshold=self.threshold, num_perm=self.permutations)
        signatures: dict[Any, Any] = {}
        for place in places:
            signature = MinHash(num_perm=self.permutations, seed=1)
            signature.update_batch([run.encode() for run in sorted(shingles(texts[place], self.words))])
            near: list[Any] = index.query(signature)
            candidates = [key for key in near if images[key] == images[place]]
            if any(signatures[key].jaccard(signature) >= self.threshold for key in candidates):
                continue
            index.insert(place, signature)
            signatures[place] = signature
        return [*signatures]


def shingles(text: str, words: int) -> set[str]:
    """Every run of so many words; a shorter text is one."""
    parts = WORD.findall(text.lower())
    if len(parts) <= words:
        return {" ".join(parts) or text}
    return {" ".join(parts[i : i + words]) for i in range(len(parts) - words + 1)}
