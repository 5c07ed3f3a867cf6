"""Whether the loss of a run has gone away from where it began."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST = 5  # losses whose mean is the beginning
LAST = 5  # losses whose mean is the present


def diverged(losses: Sequence[float]) -> tuple[float, float] | None:
    """(loss at the beginning, loss now) where the mean of the last losses is more than twice that of the
    first plus one, or no number; None where it is not, or where there are too few losses to tell.
    """
    if len(losses) < FIRST + LAST:
        return None
    first = sum(losses[:FIRST]) / FIRST
    last = sum(losses[-LAST:]) / LAST
    if math.isfinite(last) and last <= first + abs(first) + 1:
        return None
    return first, last


def sentence(first: float, last: float) -> str:
    """What a person is told of it."""
    return (
        f"the loss has diverged: {first:,.3g} at the beginning, {last:,.6g} now; lower learning_rate, or use"
        " a longer warm-up (warmup_steps)"
    )
