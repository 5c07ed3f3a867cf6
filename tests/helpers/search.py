"""Spaces, and a search on a known function."""

from __future__ import annotations

from luthier.clock import Clock
from luthier.methods.searchers._base import (
    Dim,
    Observation,
    Space,
)
from luthier.registry import build

PLANE = Space(tuple(Dim(f"x{i}") for i in range(4)))


MIXED = Space(
    (
        Dim("tuner", choices=("a", "b")),
        Dim("rate", 1e-5, 1e-1, log=True),
        Dim("a.r", 4, 64, log=True, whole=True, when=("tuner", "a")),
        Dim("b.width", 0.0, 1.0, when=("tuner", "b")),
        Dim("on", choices=(True, False)),
    )
)


def play(spec, f, trials, seed=0, space=PLANE, wanted=2, seen=None, most=None):
    """Ask and answer without anything around it: what was seen, at equal budgets in full runs; of `most`
    observations no more.
    """
    searcher, seen = build("searcher", spec), list(seen or [])
    paid: dict[int, float] = {}
    for s in seen:
        paid[s.number] = max(s.share, paid.get(s.number, 0))
    while sum(paid.values()) < trials - 1e-9 and (most is None or len(seen) < most):
        asked = searcher.ask(space, seen, wanted, Clock(seed))
        number = max(paid, default=-1) + 1 if asked.number is None else asked.number
        paid[number] = max(asked.share, paid.get(number, 0.0))
        values = f(space.encode(asked.point))
        seen.append(
            Observation(
                number,
                asked.point,
                tuple(v + 0.2 * (1 - asked.share) for v in values),
                asked.share,
                0.0,
                asked.marks,
            )
        )
    return seen
