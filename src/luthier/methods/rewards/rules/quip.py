"""QUIP: how much of a text is quoted from a trusted corpus, as the share of its character n-grams that occur
there.

The n-grams of the corpus are in a Bloom filter, which is built when the reward is first used: scoring takes
time in proportion to the text, whatever the size of the corpus, and is too high by the filter's rate of false
positives at most. Departs: the filter has a rate of its own choice and is made here; the paper takes a
published one of a part of the Pile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.registry import reward

PIECE = 2**20  # characters that are read at a time
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd, of two independent hashes


@reward(
    paper="arXiv:2404.03862",
    row="quote-tuning",
    example={"corpus": "corpus.txt"},
    use_when="answers should quote a trusted corpus word for word, so that they can be verified.",
    costs="reading the corpus once, about 1.8 bytes for each of its characters (at one false positive in a"
    " thousand), and nothing beside reading each text.",
    covers="the share of quoted n-grams by a Bloom filter of a chosen rate; pairs of like length by stage"
    " `equal_length_pairs`, trained on with `dpo`.",
    omits="the published filter of the Pile; the paper's benchmarks.",
    tests=[
        "methods/rewards/rules/test_quip.py::test_quotes_are_1_and_noise_is_0",
        "methods/rewards/rules/test_quip.py::test_the_filter_is_no_worse_than_its_design",
        "methods/rewards/rules/test_quip.py::test_dpo_quotes_more_at_the_same_length",
        "methods/stages/curate/test_equal_length_pairs.py::test_it_is_the_pair_of_a_brute_force_search",
    ],
)
class Quip(Reward):
    """Between 0 and 1; 0 for a text shorter than one n-gram."""

    corpus: str  # a text file, or JSON lines with a column `text`
    n: Annotated[int, Field(ge=1)] = 25  # characters of an n-gram
    # share of n-grams that do not occur in the corpus and pass as if they did
    false_positives: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        quoted = corpus_filter(self.corpus, self.n, self.false_positives)
        scores = []
        for text in texts:
            hits = quoted.contains(grams(text, self.n))
            scores.append(float(hits.mean()) if len(hits) else 0.0)
        return scores


class Bloom:
    """A set that never forgets a member and takes few others for one."""

    def __init__(self, members: int, false_positives: float):
        """members: how many will be added, at most."""
        bits = math.ceil(-max(members, 1) * math.log(false_positives) / math.log(2) ** 2)
        self.bits = max(bits, 64)
        self.hashes = max(1, round(self.bits / max(members, 1) * math.log(2)))
        self.table = np.zeros(self.bits // 8 + 1, dtype=np.uint8)

    def places(self, keys: np.ndarray) -> Iterator[np.ndarray]:
        """Of each hash, [N] which bit stands for each key. keys: [N, 2] uint64."""
        for k in range(self.hashes):
            yield (keys[:, 0] + np.uint64(k) * (keys[:, 1] | np.uint64(1))) % np.uint64(self.bits)

    def add(self, keys: np.ndarray) -> None:
        """keys: [N, 2] uint64, as `grams` makes them."""
        for place in self.places(keys):
            mask = np.uint8(1) << (place % np.uint64(8)).astype(np.uint8)
            np.bitwise_or.at(self.table, place // np.uint64(8), mask)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """[N] is each key, probably, a member?"""
        inside = np.ones(len(keys), dtype=bool)
        for place in self.places(keys):
            bit = self.table[place // np.uint64(8)] >> (place % np.uint64(8)).astype(np.uint8)
            inside &= (bit & 1).astype(bool)
        return inside


def grams(text: str, n: int) -> np.ndarray:
    """[N, 2] two hashes of each run of n characters."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    count = max(len(codes) - n + 1, 0)
    keys = np.zeros((count, 2), dtype=np.uint64)
    for column, multiplier in enumerate(MULTIPLIERS):
        total = keys[:, column]
        for offset in range(n):
            total *= np.uint64(multiplier)
            total += codes[offset : offset + count] + np.uint64(1)
        # the last characters alone would decide the low bits
        total ^= total >> np.uint64(31)
        total *= np.uint64(MULTIPLIERS[1 - column])
        total ^= total >> np.uint64(29)
    return keys


def documents(corpus: str) -> Iterator[str]:
    """The texts of a corpus; a text file is one. Raises RecipeError where it cannot be read."""
    path = Path(corpus).expanduser()
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield str(json.loads(line)["text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"reward 'quip': {corpus} cannot be read as a corpus: {error!r}") from None


@lru_cache(maxsize=4)
def corpus_filter(corpus: str, n: int, false_positives: float) -> Bloom:
    """The n-grams of a corpus."""
    members = sum(max(len(text) - n + 1, 0) for text in documents(corpus))
    bloom = Bloom(members, false_positives)
    for text in documents(corpus):
        for start in range(0, max(len(text) - n + 1, 0), PIECE):
            bloom.add(grams(text[start : start + PIECE + n - 1], n))
    return bloom
