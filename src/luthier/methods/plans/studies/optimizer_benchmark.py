"""Which optimizer reaches a target first: tuning budgets, targets by a tuned baseline, performance profiles.

Every optimizer trains every workload (changes of the recipe) `trials` times in each of `studies`, at learning
rates drawn around its own. The loss of a step is the mean over the last `window`. The target of a workload is
the best that the first optimizer of the list, the baseline, has reached by `target_share` of the steps in any
of its trials. The time of an optimizer is the number of steps to the target: of the best trial in a study,
then the median over studies; infinite where it is not reached. A performance profile says for each tau the
share of workloads on which an optimizer takes at most tau times as long as the fastest; the score is the area
under it from 1 to `tau`, 1 for one that is fastest everywhere (Dahl et al., 2023).

Beside it stands how far each gets without tuning (Kasimbeg et al., 2024): one rate for all workloads, once
its own default and once the best of its trials, by the same score over all of them. Departs: time is counted
in steps, the loss is that of training, and learning rates alone are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.registry import plan

Times = Mapping[str, Sequence[float]]  # who -> steps to the target of each workload


@plan(
    paper="arXiv:2306.07179",
    row="algoperf hparam-free-eval",
    use_when="you choose an optimizer, or its learning rate for several tasks at once.",
    costs="one run for each optimizer, workload, study and trial.",
    covers={
        "algoperf": "targets by a tuned baseline, the best trial of a study and the median over studies,"
        " performance profiles and the area under them; a target that is not reached counts nothing.",
        "hparam-free-eval": "one rate for all workloads: the default's score beside the best one's, which is"
        " never less; one of the optimizers without a learning rate, Prodigy, whose estimate finds the"
        " distance.",
    },
    omits={
        "algoperf": "wall-clock time, held-out variants of workloads, the self-tuning track, search spaces"
        " beyond the learning rate, a validation set, and the eight workloads of the benchmark; a run whose"
        " loss is not finite ends the plan.",
        "hparam-free-eval": "the other optimizers without a learning rate (DoG, D-Adaptation, Mechanic and"
        " others), horizons, and hyperparameters other than the learning rate.",
    },
    tests={
        "algoperf": [
            "methods/plans/studies/test_optimizer_benchmark.py::test_profiles_and_areas_of_a_table",
            "methods/plans/studies/test_optimizer_benchmark.py::test_the_median_of_the_best_trials",
            "methods/plans/studies/test_optimizer_benchmark.py::test_runs_targets_and_scores",
        ],
        "hparam-free-eval": [
            "methods/plans/studies/test_optimizer_benchmark.py::test_one_rate_for_all_workloads",
            "methods/optimizers/first_order/test_prodigy.py::test_the_estimate_finds_the_distance",
            "methods/plans/studies/test_optimizer_benchmark.py::test_runs_targets_and_scores",
        ],
    },
)
class OptimizerBenchmark(Plan):
    """Optimizers by the steps that they take to a target. The result is the run of the lowest loss on the
    first workload; its report has the table.
    """

    # what to compare; the first is the baseline, which sets the targets
    optimizers: Annotated[list[str | dict[str, Any]], Field(min_length=1)] = field(
        default_factory=lambda: ["adamw", "lion", "sgd"]
    )
    # name of an optimizer -> the rate around which its trials are drawn; others: their default
    rates: dict[str, float] = field(default_factory=lambda: {"sgd": 0.1, "prodigy": 1.0})
    # name -> changes of the recipe
    workloads: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = field(
        default_factory=lambda: {"recipe": {}}
    )
    trials: Annotated[int, Field(ge=1)] = 3  # runs of a study; the best of them counts
    studies: Annotated[int, Field(ge=1)] = 1  # repetitions; their median counts
    spread: Annotated[float, Field(ge=1)] = 10.0  # rates are drawn from rate / spread to rate * spread
    window: Annotated[int, Field(ge=1)] = 5  # steps over which the loss is averaged
    # share of the steps after which the baseline's best loss is the target
    target_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    tau: Annotated[float, Field(gt=1)] = 4.0  # profiles end where one takes so many times as long

    def __post_init__(self):
        labels = [label_of(spec) for spec in self.optimizers]
        for label in labels:
            if labels.count(label) > 1:
                raise RecipeError(
                    f"plan 'optimizer_benchmark': optimizer '{label}' is there twice; give one a label"
                )

    def recipes(self, recipe):
        arms, keys = [], []
        for spec in self.optimizers:
            label = label_of(spec)
            optim = (
                {key: value for key, value in spec.items() if key != "label"}
                if isinstance(spec, dict)
                else spec
            )
            for workload, changes in self.workloads.items():
                arm = recipe.but(**{**changes, "optim": optim})
                centre = self.rates.get(label) or arm.default_rate().value
                for number, factor in enumerate(self.factors(label, recipe.seed)):
                    arms.append(arm.but(learning_rate=centre * factor))
                    keys.append((label, workload, number))
        runs = yield arms
        curves = {}
        for key, run in zip(keys, runs, strict=True):
            curves[key] = smoothed(getattr(run, "losses", ()), self.window)
        targets, times = self.times(curves)
        table = self.table(times)
        best = self.best(keys, curves)
        result = runs[best]
        result.stats["table"] = table
        result.stats["targets"] = targets
        for line in table:
            result.notes.append(sentence(line))
        return result

    def factors(self, label: str, seed: int) -> list[float]:
        """What the rate is multiplied by in each trial of each study; the first is the default itself."""
        factors = [1.0]
        for number in range(1, self.studies * self.trials):
            draw = Clock(seed).rng("optimizer_benchmark", label, number)
            place = 2 * float(uniform(draw)) - 1
            factors.append(self.spread**place)
        return factors

    def times(self, curves: Mapping[tuple, list[float]]) -> tuple[dict[str, float], dict[tuple, float]]:
        """Targets of the workloads, and the steps to them of each run."""
        baseline = label_of(self.optimizers[0])
        targets = {}
        for workload in self.workloads:
            own = [curve for key, curve in curves.items() if key[:2] == (baseline, workload) and curve]
            reached = [min(curve[: math.ceil(self.target_share * len(curve))]) for curve in own]
            targets[workload] = min(reached, default=0.0)
        return targets, {key: steps_to(curve, targets[key[1]]) for key, curve in curves.items()}

    def table(self, times: Mapping[tuple, float]) -> list[dict[str, Any]]:
        """A line for each optimizer, the best first."""
        tuned, fixed = {}, {}
        for spec in self.optimizers:
            label = label_of(spec)
            steps = {
                w: [times[label, w, n] for n in range(self.studies * self.trials)] for w in self.workloads
            }
            tuned[label] = [median_of_studies(split(steps[w], self.trials)) for w in self.workloads]
            for n in range(self.studies * self.trials):
                fixed[f"{label}\0{n}"] = [steps[w][n] for w in self.workloads]
        scores, alone = areas(tuned, self.tau), areas(fixed, self.tau)
        lines = []
        for label, steps in tuned.items():
            own = [alone[f"{label}\0{n}"] for n in range(self.studies * self.trials)]
            reached = [None if math.isinf(t) else t for t in steps]
            line: dict[str, Any] = {"optimizer": label, "score": scores[label]}
            line |= {"default": own[0], "one rate": max(own)}
            lines.append(line | {f"steps: {w}": t for w, t in zip(self.workloads, reached, strict=True)})
        return sorted(lines, key=lambda line: -line["score"])

    def best(self, keys: Sequence[tuple], curves: Mapping[tuple, list[float]]) -> int:
        """The run of the lowest loss on the first workload."""
        first = next(iter(self.workloads))
        own = [i for i, key in enumerate(keys) if key[1] == first]
        return min(own, key=lambda i: min(curves[keys[i]], default=math.inf))


def label_of(spec: str | Mapping[str, Any]) -> str:
    """What an optimizer is called in the table."""
    return spec if isinstance(spec, str) else str(spec.get("label", spec.get("name")))


def uniform(rng: Any) -> float:
    import torch

    return float(torch.rand((), generator=rng, dtype=torch.float64))


def sentence(line: Mapping[str, Any]) -> str:
    """A line of the table in words."""
    parts = []
    for key, value in line.items():
        if key.startswith("steps: "):
            name = key.removeprefix("steps: ")
            parts.append(f"{name} {'not reached' if value is None else f'{value:g} steps'}")
    return (
        f"{line['optimizer']}: score {line['score']:.3f} (untuned {line['default']:.3f}, at its best single"
        f" rate {line['one rate']:.3f}); {', '.join(parts)}"
    )


# ---------------------------------------------------------------------------------------------- the scoring


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean over the last `window` of each step, from the first step with as many."""
    means = []
    for end in range(window, len(losses) + 1):
        means.append(sum(losses[end - window : end]) / window)
    return means


def steps_to(curve: Sequence[float], target: float) -> float:
    """How many values of a curve it takes to reach a target; infinite where it never does."""
    for number, value in enumerate(curve):
        if value <= target:
            return float(number + 1)
    return math.inf


def split(values: Sequence[float], size: int) -> list[Sequence[float]]:
    """In parts of `size`."""
    return [values[first : first + size] for first in range(0, len(values), size)]


def median_of_studies(studies: Sequence[Sequence[float]]) -> float:
    """The best trial of each study, and the median of these."""
    return median([min(trials) for trials in studies])


def ratios(times: Times) -> dict[str, list[float]]:
    """How many times as long as the fastest each takes on each workload; infinite where it never arrives."""
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    out = {}
    for name, row in times.items():
        out[name] = [math.inf if math.isinf(t) else t / best for t, best in zip(row, fastest, strict=True)]
    return out


def profile(times: Times, tau: float) -> dict[str, float]:
    """The share of workloads on which each takes at most tau times as long as the fastest."""
    return {name: sum(r <= tau for r in row) / len(row) for name, row in ratios(times).items()}


def areas(times: Times, tau: float = 4.0) -> dict[str, float]:
    """The area under each profile from 1 to tau, over tau - 1: profiles are steps, so the sum is exact."""
    out = {}
    for name, row in ratios(times).items():
        out[name] = sum(max(0.0, tau - ratio) for ratio in row) / (tau - 1) / len(row)
    return out
