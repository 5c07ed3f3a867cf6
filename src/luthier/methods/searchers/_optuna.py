"""Optuna's samplers as searchers: each question is asked of a study that holds what was seen, and nothing
else.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np

from luthier.errors import RecipeError
from luthier.methods.searchers._base import Asked, Dim, Searcher, Space, tamed
from luthier.registry import family


def optuna() -> Any:
    """The library, quiet; a sentence where it is missing."""
    try:
        import optuna
    except ImportError:
        raise RecipeError("a search needs optuna: pip install 'luthier[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@family
class ByOptuna(Searcher):
    """Family: `sampler`."""

    # does it know settings that do not always count? Else they all do, for it
    conditional: ClassVar[bool] = True

    def sampler(self, seed: int, over: Any) -> Any:
        """over: the constraints of a trial, or None where there are none."""
        raise NotImplementedError

    def ask(self, space, seen, goals, clock):
        lib, kind = optuna(), distributions(space)
        past = seen[:0] if not seen else seen
        values = tamed(np.array([s.values for s in past])) if past else []
        over = (lambda t: (t.user_attrs["over"],)) if any(s.over for s in past) else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = lib.create_study(
                directions=["minimize"] * goals,
                sampler=self.sampler(clock.derive_seed("ask", len(seen), at=0) % 2**32, over),
            )
            for s, v in zip(past, values):
                point = (
                    s.point
                    if self.conditional
                    else {d.name: s.point.get(d.name, d.start) for d in space.dims}
                )
                marks = {**s.marks, **({"constraints": [s.over]} if over else {})}
                study.add_trial(
                    lib.trial.create_trial(
                        params=dict(point),
                        distributions={k: kind[k] for k in point},
                        values=[float(x) for x in v],
                        user_attrs={"over": s.over},
                        system_attrs=marks,
                    )
                )
            trial = study.ask()
            point = space.walk(lambda d: _suggest(trial, d), everything=not self.conditional)
            marks = study._storage.get_trial_system_attrs(trial._trial_id)
        return Asked(space.active(point), marks=dict(marks))


def distributions(space: Space) -> dict[str, Any]:
    lib = optuna()
    made = {}
    for d in space.dims:
        if d.choices:
            made[d.name] = lib.distributions.CategoricalDistribution(d.choices)
        elif d.whole:
            made[d.name] = lib.distributions.IntDistribution(int(d.low), int(d.high), log=d.log)
        else:
            made[d.name] = lib.distributions.FloatDistribution(d.low, d.high, log=d.log)
    return made


def _suggest(trial: Any, d: Dim) -> Any:
    if d.choices:
        return trial.suggest_categorical(d.name, d.choices)
    if d.whole:
        return trial.suggest_int(d.name, int(d.low), int(d.high), log=d.log)
    return trial.suggest_float(d.name, d.low, d.high, log=d.log)
