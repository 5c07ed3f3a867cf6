"""Random numbers for the toy tasks: what Python draws today, written down, so that rows stay the same in
every version of Python.

Python promises to keep only seeding and `random()`; `choice`, `sample`, `shuffle` and the others may change.
Here they are once more, on `getrandbits` and `random()` alone, as Python 3.10 to 3.14 have them.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from math import ceil, log
from typing import Any


class Random(random.Random):
    """random.Random with fixed algorithms; the tasks use no method that is not here, but for `random()`."""

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        bits = n.bit_length()
        drawn = self.getrandbits(bits)
        while drawn >= n:
            drawn = self.getrandbits(bits)
        return drawn

    def randint(self, a: int, b: int) -> int:
        return a + self.below(b - a + 1)

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        start, stop = (0, start) if stop is None else (start, stop)
        return start + step * self.below(max(0, -((start - stop) // step)))

    def choice(self, seq: Sequence) -> Any:
        return seq[self.below(len(seq))]

    def choices(self, population: Sequence, weights: Sequence[float]) -> list:  # type: ignore[override]
        """One element, by weight, in a list (Python's way of asking for it)."""
        sums = list(accumulate(weights))
        return [population[bisect(sums, self.random() * (sums[-1] + 0.0), 0, len(population) - 1)]]

    def shuffle(self, x: list) -> None:  # type: ignore[override]
        for i in reversed(range(1, len(x))):
            j = self.below(i + 1)
            x[i], x[j] = x[j], x[i]

    def sample(self, population: Sequence, k: int) -> list:  # type: ignore[override]
        """k different places of a sequence, in random order."""
        n, small = len(population), 21
        if k > 5:
            small += 4 ** ceil(log(k * 3, 4))
        if n <= small:  # a list of what is left; else a set of what was taken
            pool, chosen = list(population), []
            for i in range(k):
                j = self.below(n - i)
                chosen.append(pool[j])
                pool[j] = pool[n - i - 1]
            return chosen
        taken: dict[int, None] = {}
        while len(taken) < k:
            taken.setdefault(self.below(n))
        return [population[i] for i in taken]
