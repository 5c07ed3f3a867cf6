"""Optuna's samplers as searchers: each suggestion is computed from a study of the history and
nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from luthier.methods.searchers._base import (
    Dim,
    Observation,
    Searcher,
    Space,
    Suggestion,
    finite_values,
    load_optuna,
    optuna_distributions,
)
from luthier.registry import family


@family
class OptunaSearcher(Searcher):
    """Family: `sampler`."""

    # does it know settings that do not always count? Else they all do, for it
    conditional: ClassVar[bool] = True

    def sampler(self, seed: int, constraints: Callable[[Any], Sequence[float]] | None) -> Any:
        """constraints: the violations of a trial, or None where there are none."""
        raise NotImplementedError

    def ask(self, space, history, goals, clock):
        lib = load_optuna()
        constraints = None
        if any(s.violation for s in history):
            constraints = lambda trial: (trial.user_attrs["over"],)
        seed = clock.derive_seed("ask", len(history), at=0) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = lib.create_study(directions=["minimize"] * goals, sampler=self.sampler(seed, constraints))
            values = finite_values(np.array([s.values for s in history])) if history else []
            for s, v in zip(history, values):
                study.add_trial(self._frozen(space, s, [float(x) for x in v], constraints is not None))
            trial = study.ask()
            point = space.walk(lambda d: _suggest(trial, d), everything=not self.conditional)
            marks = study._storage.get_trial_system_attrs(trial._trial_id)
        return Suggestion(space.active(point), marks=dict(marks))

    def _frozen(self, space: Space, s: Observation, values: list[float], constrained: bool) -> Any:
        """An observation as a finished trial of Optuna's."""
        point = dict(s.point)
        if not self.conditional:
            point = {d.name: s.point.get(d.name, d.start) for d in space.dims}
        marks = dict(s.marks)
        if constrained:
            marks["constraints"] = [s.violation]
        distributions = optuna_distributions(space)
        return load_optuna().trial.create_trial(
            params=point,
            distributions={k: distributions[k] for k in point},
            values=values,
            user_attrs={"over": s.violation},
            system_attrs=marks,
        )


def _suggest(trial: Any, d: Dim) -> Any:
    if d.choices:
        return trial.suggest_categorical(d.name, d.choices)
    if d.whole:
        return trial.suggest_int(d.name, int(d.low), int(d.high), log=d.log)
    return trial.suggest_float(d.name, d.low, d.high, log=d.log)
