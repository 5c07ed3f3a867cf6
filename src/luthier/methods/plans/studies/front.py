"""A Pareto front: one model for each weighting of several goals, so that the trade-off between them can be
seen and chosen from.

How goals are used depends on the recipe. With pairs, by `modpo` (a recipe with `dpo` gets it): the first goal
is the one that ranks the pairs, the others are margins. With online samples, by the stage `score` under
`online_stages`: goals are added with weights and the recipe's objective trains on the sum. All models are
measured on all goals; `hypervolume` measures how much of the goal space the front dominates. Departs from the
paper: weights are spread evenly over any number of goals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import combinations
from typing import Annotated, Any, Literal

import moocore
import numpy as np
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.registry import build, did_you_mean, plan, spec

WEIGHTS = 21  # ways to weigh the goals, evenly spread, over which the expected utility is a mean
PAIRS = "pairs"  # the goal that the pairs are ranked by, where no reward says what it is
RANKS = "reward_accuracy"  # then it is measured by how many held-out pairs the implicit reward ranks right
EXAMPLE = (
    "e.g. `plan: {name: front, goals: {casual: {name: task, objective: style}, brief: {name: length, scale:"
    " -1.0}}}`"
)


@plan(
    paper="arXiv:2310.03708",
    row="modpo hpo-morl",
    use_when="several goals conflict and you want to see and choose the trade-off.",
    costs="`points` runs; fewer where `between` takes averages.",
    covers={
        "modpo": "a front of models, one for each weighting of goals.",
        "hpo-morl": "a search for the configuration with the best front, as a mean over seeds.",
    },
    tests={
        "modpo": [
            "methods/plans/studies/test_front.py::test_a_front_is_measured_drawn_and_goes_on",
        ],
        "hpo-morl": [
            "study/test_search.py::test_a_plan_is_searched_by_its_front",
            "study/test_search.py::test_a_search_over_fronts_finds_more_than_the_default",
        ],
    },
)
class Front(Plan):
    """`luthier tune recipe.yaml --front 5` is short for `plan: {name: front, points: 5}`. The plan's result
    is the most balanced model: the largest product of what it reaches above `worst` in each goal. `luthier
    search --goals hypervolume` (or `utility`, `sparsity`) searches for the configuration with the best front,
    as a mean over seeds (arXiv:2310.16487).
    """

    # name: a reward; not given: the rewards of the recipe's scoring stages
    goals: dict[str, Any] = field(default_factory=dict)
    points: Annotated[int, Field(ge=2)] = 5  # number of models, with evenly spread weights
    # the weights themselves, one list per model in the order of goals
    preferences: list[list[float]] | None = None
    # how the models between the ends are made: each tuned, or the average of those at the ends
    between: Literal["tuned", "average"] = "tuned"
    least: Annotated[float, Field(ge=0, lt=0.5)] = 0.1  # minimum weight of a goal
    # reference point of the hypervolume in each goal; else 0 for shares, the lowest value for others
    worst: dict[str, float] = field(default_factory=dict)
    judged: Annotated[int, Field(ge=1)] = 64  # held-out prompts that are answered
    samples: Annotated[int, Field(ge=1)] = 1  # answers per prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of an answer

    def __post_init__(self):
        for reward in self.goals.values():
            if reward is not None:
                build("reward", reward)
        for some in self.preferences or ():
            if any(w < 0 for w in some) or not sum(some):
                raise ValueError(f"preferences: {some} must be weights of 0 or more")
        if unknown := [name for name in self.worst if self.goals and name not in self.goals]:
            raise ValueError(f"worst: there is no goal '{unknown[0]}'{did_you_mean(unknown[0], self.goals)}")

    def recipes(self, recipe):
        goals = self.of(recipe)
        vectors = self.vectors(len(goals))
        rewards = {name: reward for name, reward in goals.items() if reward is not None}
        how = {"n": self.judged, "samples": self.samples, "max_new_tokens": self.max_new_tokens}
        measure = [
            {"name": "goals", "goals": rewards, **how},
            *(["preference"] if len(rewards) < len(goals) else []),
        ]
        measuring = {"evaluate": [*(recipe.evaluate or ()), *measure]}
        # in the order of goals, as weights are
        ends = [[float(i == k) for i in range(len(goals))] for k in range(len(goals))]
        tuned = vectors if self.between == "tuned" else self.raised(ends)
        reports = yield [recipe.but(**weigh(recipe, goals, vector), **measuring) for vector in tuned]
        start = reports[0].before
        if self.between == "average":
            folders = [r.folder for r in reports]
            merges = [{"name": "average", "weights": self.lowered(vector)} for vector in vectors]
            reports = yield [
                recipe.but(
                    init_from={"merge": merge, "of": folders},
                    objective=None,
                    stages=[],
                    online_stages=[],
                    **measuring,
                )
                for merge in merges
            ]
        names = _metrics(goals)
        reached = [[measured(r, metric) for metric in names.values()] for r in reports]
        before = [float(start[metric]) for metric in names.values()]
        worst = self.floor(list(goals), [before, *reached])
        best = max(zip(reports, reached, strict=True), key=lambda both: _box(both[1], worst))[0]
        on_front = best_of(reached)
        volume = hypervolume(reached, worst)
        best.stats["front"] = {
            "metrics": names,
            "preferences": vectors,
            "reached": reached,
            "before": before,
            "folders": [r.folder for r in reports],
            "kept": on_front,
            "worst": worst,
            "hypervolume": volume,
            "utility": expected_utility(reached, spread(len(goals), WEIGHTS)),
            "sparsity": sparsity(reached) if len(on_front) > 1 else None,
        }
        best.stats["hypervolume"] = volume
        best.stats["table"] = _table(list(goals), best.stats["front"])
        best.notes.append(
            f"hypervolume of the front {volume:.4g}, above {_formatted(dict(zip(goals, worst, strict=True)))}"
        )
        if len(on_front) < len(reports):
            best.notes.append(
                f"{len(reports) - len(on_front)} of {len(reports)} models are not on the Pareto"
                " front: another is at least as good in every goal"
            )
        return best

    def front(self, recipe):
        return {metric: self.worst.get(name) for name, metric in _metrics(self.of(recipe)).items()}

    @staticmethod
    def figure(name: str, values: Sequence[Sequence[float]], worst: Sequence[float] = ()) -> float:
        """A front in one number: its `hypervolume` above `worst`, `utility` or `sparsity`. values: [points,
        goals], each goal the larger the better.
        """
        if name == "hypervolume":
            return hypervolume(values, worst)
        if name == "utility":
            return expected_utility(values, spread(len(values[0]), WEIGHTS))
        return sparsity(values)

    def page(self, report):
        from luthier.report.front import page

        return page(report)

    def of(self, recipe: Any) -> dict[str, Any]:
        """Name -> reward as plain data, None for what only the pairs say."""
        goals = {name: spec(reward) for name, reward in self.goals.items()}
        if not goals and (score := _stage(recipe.online_stages, "score")):
            goals = _rewards(score)
        elif not goals and (judge := _stage(recipe.stages, "score_with")):
            goals = {PAIRS: None, **_rewards(judge)}
        if not goals:
            raise RecipeError(f"plan 'front' needs goals, each with a reward: {EXAMPLE}")
        if len(goals) < 2:
            raise RecipeError(
                f"plan 'front' needs at least two goals, not only {next(iter(goals))}: {EXAMPLE}"
            )
        if any(reward is None for reward in list(goals.values())[1:]):
            raise RecipeError("plan 'front': only the first goal, which ranks the pairs, may have no reward")
        return goals

    def vectors(self, goals: int) -> list[list[float]]:
        """The weights of each model, adding up to 1."""
        if self.preferences is not None:
            for some in self.preferences:
                if len(some) != goals:
                    raise RecipeError(
                        f"plan 'front': preferences {some} have {len(some)} weights for {goals} goals"
                    )
            return [[w / sum(some) for w in some] for some in self.preferences]
        if goals * self.least >= 1:
            raise RecipeError(
                f"plan 'front': {goals} goals with a weight of at least {self.least:g} each"
                " leave nothing to vary; lower `least`"
            )
        return self.raised(spread(goals, self.points))

    def raised(self, vectors: Sequence[Sequence[float]]) -> list[list[float]]:
        """The same weights, none of them below `least`."""
        return [[self.least + (1 - len(some) * self.least) * w for w in some] for some in vectors]

    def lowered(self, weights: Sequence[float]) -> list[float]:
        """How much of each end makes a model of these weights: what `raised` did, undone."""
        shares = [max(0.0, w - self.least) for w in weights]
        return shares if sum(shares) else [1.0] * len(shares)

    def floor(self, names: Sequence[str], points: Sequence[Sequence[float]]) -> list[float]:
        """Where the volume begins in each goal."""
        columns = zip(*points, strict=True)
        usual = [0.0 if all(0 <= v <= 1 for v in column) else min(column) for column in columns]
        return [self.worst.get(name, value) for name, value in zip(names, usual, strict=True)]


def weigh(recipe: Any, goals: Mapping[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """The changes that make a recipe go for goals by these weights."""
    if _stage(recipe.online_stages, "score"):
        if None in goals.values():
            raise RecipeError("plan 'front': with sampled completions, every goal needs a reward")
        score = {"reward": list(goals.values()), "names": list(goals), "reward_weights": list(weights)}
        stages = [{"name": "score", **score} if _name(s) == "score" else s for s in recipe.online_stages]
        return {"online_stages": stages}
    aim = spec(recipe.aim()) if recipe.objective is not None and hasattr(recipe.aim(), "kind") else {}
    if aim.get("name") not in ("dpo", "modpo"):
        raise RecipeError(
            "plan 'front' weights goals by objective 'modpo' (or 'dpo') on pairs, or by the"
            " stage 'score' under `online_stages` on samples; this recipe has objective"
            f" {aim.get('name') or recipe.objective} and no such stage"
        )
    if not weights[0]:
        raise RecipeError(
            f"plan 'front': '{next(iter(goals))}' ranks the pairs, so its weight cannot be 0 with modpo"
        )
    others = list(goals)[1:]
    there = _rewards(_stage(recipe.stages, "score_with")) if _stage(recipe.stages, "score_with") else {}
    there = {**there, **(aim.get("weights") or {})}  # what modpo weighs already, the recipe's own stages give
    new = [name for name in others if name not in there]
    judge = [{"name": "score_with", "reward": [goals[name] for name in new], "names": new}] if new else []
    objective = {"name": "modpo", "beta": aim["beta"], "weights": dict(zip(others, weights[1:], strict=True))}
    return {"objective": objective, "stages": [*recipe.stages, *judge]}


def spread(goals: int, points: int) -> list[list[float]]:
    """Points of the simplex, as far from each other as can be: of a fine lattice the corners first, then
    always the one that is farthest from all that were taken."""
    if goals == 2:  # the same, exactly even
        return [[i / (points - 1), 1 - i / (points - 1)] for i in range(points)]
    size = max(12, 2 * points) if goals < 5 else 6
    cuts = combinations(range(size + goals - 1), goals - 1)
    lattice = [
        [(b - a - 1) / size for a, b in zip((-1, *c), (*c, size + goals - 1), strict=True)] for c in cuts
    ]
    taken = [[float(i == k) for i in range(goals)] for k in range(goals)][:points]
    distances = [min(_apart(x, t) for t in taken) for x in lattice]
    while len(taken) < points:
        taken.append(lattice[max(range(len(lattice)), key=distances.__getitem__)])
        distances = [min(d, _apart(x, taken[-1])) for d, x in zip(distances, lattice, strict=True)]
    return taken


def best_of(values: Sequence[Sequence[float]]) -> list[int]:
    """The points that no other beats; equal ones stay together. values: the larger the better."""
    best = moocore.is_nondominated(np.asarray(values, float), maximise=True, keep_weakly=True)
    return np.flatnonzero(best).tolist()


def hypervolume(values: Sequence[Sequence[float]], worst: Sequence[float]) -> float:
    """The volume between a front and `worst`; points that do not lie above it in every goal add nothing."""
    return float(moocore.hypervolume(np.asarray(values, float), ref=np.asarray(worst, float), maximise=True))


def expected_utility(values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> float:
    """What users get on average: each takes the point that is best under weights of their own."""
    return float((np.asarray(weights, float) @ np.asarray(values, float).T).max(1).mean())


def sparsity(values: Sequence[Sequence[float]]) -> float:
    """Squared gaps between neighbours on the front, goal by goal, by one less than its points. Of one point
    it says nothing: inf.
    """
    points = np.unique(np.asarray(values, float)[best_of(values)], axis=0)
    if len(points) < 2:
        return float("inf")
    return float((np.diff(np.sort(points, axis=0), axis=0) ** 2).sum() / (len(points) - 1))


def _metrics(goals: Mapping[str, Any]) -> dict[str, str]:
    """What each goal is measured by."""
    return {name: RANKS if reward is None else f"goal/{name}" for name, reward in goals.items()}


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def _box(values: Sequence[float], worst: Sequence[float]) -> float:
    """The volume that a point alone reaches."""
    return hypervolume([values], worst)


def _name(method: Any) -> Any:
    return method.get("name") if isinstance(method, Mapping) else method


def _stage(stages: Sequence[Any], name: str) -> Any:
    """The first stage of this name, built; None where there is none."""
    return next((build("stage", s) for s in stages if _name(spec(s)) == name), None)


def _rewards(stage: Any) -> dict[str, Any]:
    """Name -> reward of a stage that judges."""
    return {stage.named(k): spec(reward) for k, reward in enumerate(stage.reward)}


def _formatted(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _table(names: Sequence[str], stats: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the console lists: weights, what was reached, and whether it is on the front."""
    return [
        {
            "weights": _formatted(dict(zip(names, weights, strict=True))),
            **{name: f"{value:.3f}" for name, value in zip(names, values, strict=True)},
            "front": "yes" if i in stats["kept"] else "",
        }
        for i, (weights, values) in enumerate(zip(stats["preferences"], stats["reached"], strict=True))
    ]
