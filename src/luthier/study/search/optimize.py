"""The loop of a search: suggest, measure, write down, until the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from luthier.clock import Clock
from luthier.methods.searchers._base import Observation, Searcher, Suggestion
from luthier.study.search.trials import Measurement, Trial, TrialStore, full_runs, number_of

ROUNDING = 1e-9  # shares of a run add up to whole runs but for this much


def optimize(
    store: TrialStore,
    searcher: Searcher,
    measure: Callable[[Any, int], Measurement],
    trials: float = math.inf,
    seconds: float = math.inf,
    first: Sequence[tuple[Suggestion, str]] = (),
    seed: int = 0,
    progress: Callable[[Trial], None] = lambda trial: None,
    crew: bool = False,
) -> list[Trial]:
    """Every trial of the store, once the budget is spent: `trials` full runs, or `seconds` of measuring.

    What other workers are measuring counts as observed at the median, so that no two measure the same.

    measure: (Optuna's trial, number of its configuration) -> what came of it.
    first: suggestions and their kinds, measured before the searcher is asked.
    progress: called with each trial that ends.
    crew: the other workers are alive, and what they are measuring counts as spent.
    """
    while True:
        t = _next(store, searcher, trials, seconds, first, seed, crew)
        if t is None:
            return store.finished()
        progress(store.end(t, measure(t, number_of(t))))


def _next(
    store: TrialStore,
    searcher: Searcher,
    trials: float,
    seconds: float,
    first: Sequence[tuple[Suggestion, str]],
    seed: int,
    crew: bool,
) -> Any:
    """Optuna's trial to be measured next: one that was interrupted, one of `first`, or the searcher's; None
    where the budget is spent.
    """
    interrupted = store.running()
    if interrupted:
        return interrupted[0]
    finished = store.finished()
    begun = sum(trial.kind != "suggested" for trial in finished)
    if begun < len(first):
        return store.begin(*first[begun])
    # the recipe itself may lie outside of the space; then the searcher does not learn of it
    history = [t.observation for t in finished if t.observation.point or t.kind != "recipe"]
    others = store.in_flight(history)
    used = full_runs(finished)
    if crew:
        used += _shares(others)
    if used >= trials - ROUNDING or sum(trial.measurement.seconds for trial in finished) >= seconds:
        return None
    suggestion = searcher.ask(store.space, [*history, *others], len(store.goals), Clock(seed))
    cost = suggestion.share - _share_reached(finished, suggestion.number)
    if _exceeds(used, cost, trials):
        return None
    t = store.begin(suggestion)
    if crew:
        # others may have begun since the store was read: whoever wrote first goes on
        used = full_runs(store.finished())
        used += _shares(store.in_flight(history, before=t.number))
        if _exceeds(used, cost, trials):
            store.withdraw(t)
            return None
    return t


def _share_reached(finished: Sequence[Trial], number: int | None) -> float:
    """The largest share of its steps after which a configuration was measured."""
    share = 0.0
    for trial in finished:
        if trial.observation.number == number:
            share = max(share, trial.observation.share)
    return share


def _shares(observations: Sequence[Observation]) -> float:
    """What these cost, in full runs."""
    return sum(observation.share for observation in observations)


def _exceeds(used: float, cost: float, budget: float) -> bool:
    """Is this more than the budget? The first run always fits."""
    return used > 0 and used + cost > budget + ROUNDING
