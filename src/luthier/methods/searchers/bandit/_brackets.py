"""Brackets of successive halving: many configurations after few steps, the better ones further, a few to the
end.

A run is paused at a fraction of its steps and resumed, so only the difference is paid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.clock import Clock
from luthier.methods.searchers._base import (
    Observation,
    Searcher,
    Space,
    Suggestion,
    at_common_share,
    best_first,
)
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


def measured_in(history: Sequence[Observation], bracket: int, rung: int) -> list[Observation]:
    """The observations of one rung of one bracket."""
    return [s for s in history if s.marks.get("bracket") == bracket and s.marks.get("rung") == rung]


@family
class Shares(Searcher):
    """Family: searchers that measure after min_share of the steps, eta times as much, and so on up to the
    end.
    """

    # ratio between two fractions of the steps; one in eta configurations continues
    eta: Annotated[float, Field(gt=1)] = 3.0
    # fraction of the steps after which configurations are first measured
    min_share: Annotated[float, Field(gt=0, le=1)] = 1 / 9

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
    """Family: `bracket` returns the rungs of the n-th bracket."""

    inner: Annotated[Any, nested("searcher")] = "random"  # searcher that proposes new configurations

    def bracket(self, number: int) -> Bracket:
        raise NotImplementedError

    def ask(self, space, history, goals, clock):
        number = 0
        while True:
            for rung, (n, share) in enumerate(self.bracket(number)):
                there = measured_in(history, number, rung)
                if len(there) < n:
                    marks = {"bracket": number, "rung": rung}
                    if rung == 0:
                        return self.propose(space, history, goals, clock, share, marks)
                    below = measured_in(history, number, rung - 1)
                    continued = {s.number for s in there}
                    best = next(s for s in best_first(below) if s.number not in continued)
                    return Suggestion(dict(best.point), share, best.number, marks)
            number += 1

    def propose(
        self,
        space: Space,
        history: Sequence[Observation],
        goals: int,
        clock: Clock,
        share: float,
        marks: dict[str, Any],
    ) -> Suggestion:
        """A new configuration, by `inner`, from observations at the largest share that has enough of them."""
        some = at_common_share(history, len(space.dims) + 2)
        own = Clock(clock.derive_seed("bracket", len(history), at=0))
        suggestion = self.inner.ask(space, some, goals, own)
        return Suggestion(suggestion.point, share, marks={**suggestion.marks, **marks})
