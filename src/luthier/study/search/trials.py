"""What was suggested and what came of it, in an Optuna storage: a journal in the search's folder, or any
database. The searcher is a function of it, so a search that was killed resumes as if it had not been.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.errors import NothingMoves, RecipeError
from luthier.methods.searchers._base import (
    Observation,
    Space,
    Suggestion,
    finite_values,
    load_optuna,
    optuna_distributions,
)
from luthier.study.goals import Goal, Limit

# attributes of Optuna's trials as version 0.1 wrote them -> as they are called now
FORMER_ATTRIBUTES = {"took": "seconds", "of": "configuration"}
FORMER_KINDS = {"asked": "suggested"}
# it had no codes: in its message of a run in which nothing was left to be trained
FORMER_IDLE_MESSAGE = "moves nothing"


@dataclass(frozen=True)
class Measurement:
    """What came of a configuration after a share of its steps."""

    by_seed: Mapping[int, Mapping[str, float]]  # tuning seed -> metric -> value
    seconds: float = 0.0  # loading and evaluating included
    failed: str = ""  # why there are no numbers, if so
    code: str = ""  # of what it failed with (luthier/errors.py)

    @property
    def idle(self) -> bool:
        """Did it fail because no parameter was left to be trained?"""
        return self.code == NothingMoves.code

    def mean(self) -> dict[str, float]:
        """The mean over seeds of the metrics that every seed has."""
        runs = list(self.by_seed.values())
        means: dict[str, float] = {}
        if runs:
            shared = set.intersection(*map(set, runs))
            for metric in runs[0]:
                if metric in shared:
                    means[metric] = float(np.mean([run[metric] for run in runs]))
        return means


@dataclass(frozen=True)
class Trial:
    """A configuration that was measured."""

    observation: Observation
    measurement: Measurement
    goals: dict[str, float]  # by name, in their own direction
    kind: str  # where it is from: "recipe", "earlier" (another search) or "suggested" (by the searcher)

    @property
    def complete(self) -> bool:
        """Was it measured after all of its steps?"""
        return self.observation.share >= 1 and not self.measurement.failed

    @property
    def feasible(self) -> bool:
        """Was it measured after all of its steps, within the limits?"""
        return self.complete and self.observation.violation <= 0


@dataclass
class TrialStore:
    """Trials of one search. Several workers may share a database; each resumes only what it began itself."""

    space: Space
    goals: Sequence[Goal]
    limits: Sequence[Limit]
    storage: Any = None  # Optuna's, or a URL; None: in memory
    name: str = "search"
    worker: str = "-"
    study: Any = field(init=False, repr=False)

    def __post_init__(self):
        lib = load_optuna()
        try:
            self.study = lib.create_study(
                storage=self.storage,
                study_name=self.name,
                directions=["minimize"] * len(self.goals),
                load_if_exists=True,
            )
        except Exception as error:
            if self.storage is None:
                raise
            raise RecipeError(f"--storage: {str(error).strip().splitlines()[0]}") from None

    def finished(self) -> list[Trial]:
        """Every trial that was measured, in the order in which they ended."""
        ended = self._in_state("done")
        ended.sort(key=lambda t: (t.user_attrs["ended"], t.number))
        return list(map(self._trial, ended))

    def running(self) -> list[Any]:
        """Optuna's trials that this worker began and did not end."""
        return [t for t in self._in_state("RUNNING") if t.user_attrs["worker"] == self.worker]

    def in_flight(self, history: Sequence[Observation], before: float = math.inf) -> list[Observation]:
        """What other workers began and did not end, as if each had come out like the median of history.

        before: only trials with a number below this one.
        """
        values = [s.values for s in history] or [(0.0,) * len(self.goals)]
        median = tuple(np.median(finite_values(np.array(values)), 0).tolist())
        others = []
        for t in self._in_state("RUNNING"):
            if t.user_attrs["worker"] != self.worker and t.number < before:
                attrs = attributes(t)
                others.append(
                    Observation(number_of(t), attrs["point"], median, attrs["share"], 0.0, attrs["marks"])
                )
        return others

    def begin(self, suggestion: Suggestion, kind: str = "suggested") -> Any:
        """Write down a configuration that is about to be measured; Optuna's trial of it."""
        lib, key = load_optuna(), uuid.uuid4().hex
        params: dict[str, Any] = {}
        distributions: dict[str, Any] = {}
        for name, distribution in optuna_distributions(self.space).items():
            if name in suggestion.point:
                params[name] = suggestion.point[name]
                distributions[name] = distribution
        attrs = {
            "key": key,
            "point": dict(suggestion.point),
            "share": suggestion.share,
            "configuration": suggestion.number,
            "marks": dict(suggestion.marks),
            "kind": kind,
            "worker": self.worker,
        }
        self.study.add_trial(
            lib.trial.create_trial(
                state=lib.trial.TrialState.RUNNING,
                params=params,
                distributions=distributions,
                user_attrs=attrs,
            )
        )
        for t in reversed(self.study.get_trials(deepcopy=False)):
            if t.user_attrs.get("key") == key:
                return t
        raise LookupError(f"trial {key} is not in its storage")

    def withdraw(self, t: Any) -> None:
        """Undo `begin`."""
        lib = load_optuna().trial
        lib.Trial(self.study, t._trial_id).set_user_attr("state", "withdrawn")
        self.study.tell(t.number, state=lib.TrialState.FAIL)

    def end(self, t: Any, measurement: Measurement) -> Trial:
        """Write down what came of a trial that was begun."""
        lib = load_optuna().trial
        latest = max((x.user_attrs["ended"] for x in self._in_state("done")), default=0)
        attrs = {
            "by_seed": {str(seed): dict(metrics) for seed, metrics in measurement.by_seed.items()},
            "seconds": measurement.seconds,
            "failed": measurement.failed,
            "code": measurement.code,
            "ended": 1 + latest,
            "state": "done",
        }
        writer = lib.Trial(self.study, t._trial_id)
        for key, value in attrs.items():
            writer.set_user_attr(key, value)
        trial = self._trial(self.study.get_trials(deepcopy=False)[t.number])
        values = trial.observation.values
        if measurement.failed or not all(map(math.isfinite, values)):
            self.study.tell(t.number, state=lib.TrialState.FAIL)
        elif trial.observation.share < 1:  # its numbers do not compare with those of whole runs
            self.study.tell(t.number, state=lib.TrialState.PRUNED)
        else:
            self.study.tell(t.number, list(values))
        return trial

    def _in_state(self, state: str) -> list[Any]:
        trials = []
        for t in self.study.get_trials(deepcopy=False):
            if "key" in t.user_attrs and t.user_attrs.get("state", "RUNNING") == state:
                trials.append(t)
        return trials

    def _trial(self, t: Any) -> Trial:
        attrs = attributes(t)
        by_seed = {int(seed): metrics for seed, metrics in attrs["by_seed"].items()}
        measurement = Measurement(by_seed, attrs["seconds"], attrs["failed"], attrs["code"])
        mean = measurement.mean()
        values: list[float] = []
        goals: dict[str, float] = {}
        for goal in self.goals:
            value = math.inf if measurement.failed else goal.value(mean)
            values.append(value)
            goals[goal.name] = goal.shown_value(value)
        violation = float(bool(measurement.failed and self.limits))
        if not measurement.failed:
            violation = sum(limit.violation(mean) for limit in self.limits)
        observation = Observation(
            number_of(t), attrs["point"], tuple(values), attrs["share"], violation, attrs["marks"]
        )
        return Trial(observation, measurement, goals, attrs["kind"])


def attributes(t: Any) -> dict[str, Any]:
    """What is written down of one of Optuna's trials, also by version 0.1."""
    attrs: dict[str, Any] = {}
    for key, value in t.user_attrs.items():
        name = FORMER_ATTRIBUTES[key] if key in FORMER_ATTRIBUTES else key
        attrs[name] = value
    attrs["kind"] = FORMER_KINDS.get(attrs["kind"], attrs["kind"])
    if "code" not in attrs:
        attrs["code"] = ""
        if FORMER_IDLE_MESSAGE in attrs.get("failed", ""):
            attrs["code"] = NothingMoves.code
    return attrs


def number_of(t: Any) -> int:
    """The number of the configuration that a trial of Optuna's measures, perhaps further than before."""
    earlier = attributes(t)["configuration"]
    return t.number if earlier is None else earlier


def full_runs(trials: Sequence[Trial]) -> float:
    """What trials cost, in full runs: one that was resumed pays only the difference. Those in which nothing
    moved did not run; they are free, up to one for each run that was paid.
    """
    shares: dict[int, float] = {}
    idle: set[int] = set()
    for trial in trials:
        number = trial.observation.number
        shares[number] = max(shares.get(number, 0.0), trial.observation.share)
        if trial.measurement.idle:
            idle.add(number)
    for number in idle:
        del shares[number]
    paid = sum(shares.values())
    return paid + max(0.0, len(idle) - paid)
