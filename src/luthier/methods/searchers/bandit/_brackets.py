"""Brackets of successive halving: many configurations after few steps, the better ones further, a few to the
end.

A run that goes on is not begun anew: it is paused at a share of its steps and only the difference is paid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.clock import Clock
from luthier.methods.searchers._base import Asked, Searcher, Seen, Space, ranked, telling
from luthier.registry import family, nested

Bracket = list[tuple[int, float]]  # rungs: how many configurations, after which share of their steps


def halving(n: int, share: float, eta: float) -> Bracket:
    """n configurations at a share, the best n / eta of them at eta times the share, and so on up to 1."""
    rungs = []
    while True:
        rungs.append((max(1, n), min(1.0, share)))
        if share > 1 / eta + 1e-9 or n < 1:
            return [*rungs[:-1], (rungs[-1][0], 1.0)]
        n, share = int(n / eta + 1e-9), share * eta


def cost(bracket: Bracket, anew: bool = False) -> float:
    """Full runs that a bracket takes. anew: if every rung trained from the start, as the papers count."""
    paid, before = 0.0, 0.0
    for n, share in bracket:
        paid += n * (share if anew else share - before)
        before = share
    return paid


@family
class Shares(Searcher):
    """Family: searchers that measure after min_share of the steps, eta times as much, and so on up to the
    end.
    """

    # from one share to the next; of brackets: one in so many goes on
    eta: Annotated[float, Field(gt=1)] = 3.0
    min_share: Annotated[float, Field(gt=0, le=1)] = 1 / 9  # of the steps, after which the first are measured

    @property
    def rungs(self) -> int:
        """How often the share can be multiplied by eta up to 1."""
        n = 0
        while self.eta ** (n + 1) * self.min_share <= 1 + 1e-9:
            n += 1
        return n

    @property
    def shares(self):
        return tuple(self.eta**-i for i in range(self.rungs, -1, -1))


@family
class Brackets(Shares):
    """Family: `bracket` says the rungs of the n-th bracket."""

    inner: Annotated[Any, nested("searcher")] = "random"  # who proposes new configurations

    def bracket(self, number: int) -> Bracket:
        raise NotImplementedError

    def ask(self, space, seen, goals, clock):
        number = 0
        while True:
            for rung, (n, share) in enumerate(self.bracket(number)):
                there = [s for s in seen if s.marks.get("bracket") == number and s.marks.get("rung") == rung]
                if len(there) < n:
                    marks = {"bracket": number, "rung": rung}
                    if rung == 0:
                        return self.propose(space, seen, goals, clock, share, marks)
                    below = [
                        s
                        for s in seen
                        if s.marks.get("bracket") == number and s.marks.get("rung") == rung - 1
                    ]
                    gone = {s.number for s in there}
                    best = next(s for s in ranked(below) if s.number not in gone)
                    return Asked(dict(best.point), share, best.number, marks)
            number += 1

    def propose(
        self,
        space: Space,
        seen: Sequence[Seen],
        goals: int,
        clock: Clock,
        share: float,
        marks: dict[str, Any],
    ) -> Asked:
        """A new configuration, from what was seen at the most telling share."""
        some = telling(seen, len(space.dims) + 2)
        asked = self.inner.ask(space, some, goals, Clock(clock.derive_seed("bracket", len(seen), at=0)))
        return Asked(asked.point, share, marks={**asked.marks, **marks})
