"""What is searched: the space, the goals, the limits, the searcher, the budget and the seeds. What cannot
work is refused before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.data.load import Data, load_data, sample_rows
from luthier.errors import RecipeError
from luthier.methods.searchers._base import load_optuna
from luthier.recipe.capabilities import columns_of, requirements
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import dry_run, first_run, validate
from luthier.registry import build, evaluator_of, provides_of, spec
from luthier.report.search_result import RESULT, read_result
from luthier.study.compare import DEFAULT_EVALUATORS, TUNING_SEED, parse_budget
from luthier.study.goals import Goal, Limit, parse_goals, parse_limits
from luthier.study.space import SearchSpace, parse_space

DEFAULT_SEARCHER = "gp"
DEFAULT_TRIALS = 40.0
SAMPLE = 100  # rows by which recipes are validated


@dataclass(frozen=True)
class SearchSpec:
    """A search."""

    space: SearchSpace
    goals: tuple[Goal, ...]
    limits: tuple[Limit, ...]
    quality: str  # the metric by which the chosen configurations are compared
    searcher: Any
    trials: float  # full runs at most
    seconds: float  # of measuring at most
    seeds: tuple[int, ...]  # tuning seeds: a configuration is scored by its mean over them
    test_seeds: tuple[int, ...]
    earlier: tuple[dict[str, Any], ...] = ()  # points that an earlier search chose
    subprocesses: bool = True  # each run in a process of its own
    evaluate: tuple[Any, ...] = ()  # evaluators of the chosen configurations, beyond those of the goals
    # rows on which the chosen configurations are tested; None: those by which they were chosen
    test_data: Any = None

    def fingerprint(self) -> str:
        """Of what decides a trial; how long a search goes on does not."""
        parts = [
            self.space.recipe.public(),
            [repr(dim) for dim in self.space.space.dims],
            [goal.name for goal in self.goals],
            [limit.text for limit in self.limits],
            spec(self.searcher),
            self.seeds,
            self.earlier,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def search_spec(
    recipe: Any,
    space: Sequence[str] = (),
    goals: Sequence[str] = (),
    constraint: Sequence[str] = (),
    *,
    trials: float | None = None,
    budget: str | None = None,
    sampler: Any = DEFAULT_SEARCHER,
    seeds: Any = 1,
    test_seeds: Any = 3,
    metric: str | None = None,
    earlier: str | Path | None = None,
    test_data: Any = None,
    subprocesses: bool = True,
    changes: Sequence[str] | Mapping[str, Any] | None = None,
) -> SearchSpec:
    """The arguments of `luthier.search`, resolved and checked. Raises RecipeError for what cannot work."""
    base = Recipe.load(recipe, changes).but(output_dir=None, overwrite=False)
    searcher = build("searcher", sampler)
    load_optuna()
    tuning = parse_seeds(seeds, TUNING_SEED, "--seeds")
    test = parse_seeds(test_seeds, 0, "--test-seeds")
    both = sorted(set(tuning) & set(test))
    if both:
        raise RecipeError(
            f"seeds {', '.join(map(str, both))} are in both --seeds and --test-seeds; use other"
            " test seeds, as a configuration looks too good on the seeds that selected it"
        )
    most_trials, most_seconds = _parse_trials_and_budget(trials, budget)
    if base.plan is not None and len(searcher.shares) > 1:
        raise RecipeError(
            f"--sampler {searcher.name} pauses runs, but a plan of several runs cannot be"
            " paused; use tpe, gp, nsga or random"
        )
    data = load_data(base)
    if test_data is not None:
        _check_test_data(base, data, test_data)
    sample = data.rows[:SAMPLE]
    quality = metric or _default_quality(base, sample)
    plan_front = {} if base.plan is None else build("plan", base.plan).front(base)
    parsed_goals = parse_goals(goals, quality, plan_front)
    limits = parse_limits(constraint, quality)
    search_space = parse_space(base, space)
    _check_space(search_space, sample)
    base = search_space.recipe
    evaluate: list[str] = []
    if base.evaluate is None:
        base, evaluate = _choose_evaluators(base, sample, parsed_goals, limits, quality)
    base = base.but(save_steps=100_000, save_total_limit=1, report_to=[])
    search_space = replace(search_space, recipe=base)
    return SearchSpec(
        search_space,
        parsed_goals,
        limits,
        quality,
        searcher,
        most_trials,
        most_seconds,
        tuning,
        test,
        _earlier_points(earlier, search_space) if earlier else (),
        subprocesses,
        tuple(evaluate),
        test_data,
    )


# ----------------------------------------------------------------------------- seeds and budget


def parse_seeds(value: Any, first: int, option: str) -> tuple[int, ...]:
    """3 -> three from `first` on; '5,6,7' or [5, 6, 7] -> these. Raises RecipeError for anything else."""
    if isinstance(value, (list, tuple)):
        seeds = tuple(map(int, value))
    else:
        seeds = _parse_seed_text(str(value), first, option)
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"{option}: '{value}' must be one or more different seeds")
    return seeds


def _parse_seed_text(text: str, first: int, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise RecipeError(f"{option}: '{text}' must be a number of seeds, or seeds such as 5,6,7") from None
    if "," in text:
        return numbers
    count = numbers[0] if numbers else 0
    return tuple(range(first, first + count))


def _parse_trials_and_budget(trials: float | None, budget: str | None) -> tuple[float, float]:
    """Full runs and seconds at most."""
    if trials is not None and budget is not None:
        raise RecipeError("pass either --trials (full runs) or --budget (time), not both")
    if trials is not None and trials < 1:
        raise RecipeError(f"--trials: {trials} must be at least 1")
    if budget is None:
        return float(trials or DEFAULT_TRIALS), math.inf
    unit, seconds = parse_budget(budget)
    if unit != "seconds":
        raise RecipeError(
            f"--budget: '{budget}' must be a time such as 30m or 2h; set max_steps=... for the"
            " length of each run, and --trials for their number"
        )
    return math.inf, seconds


# ------------------------------------------------------------------------------------------ rows


def _check_test_data(recipe: Recipe, data: Data, test_data: Any) -> None:
    """Refuse test rows that a run is trained on, or by which configurations are chosen."""
    test = load_data(recipe.but(eval_data=test_data)).held_out
    used = set(map(_content, (*data.rows, *data.held_out)))
    twice = sum(_content(row) in used for row in test)
    if twice:
        raise RecipeError(
            f"--test-data: {twice} of {len(test)} rows are also in data or eval_data; test on"
            " rows that did not select the configuration"
        )
    if not test:
        raise RecipeError(f"--test-data: {test_data} has no rows")


def _content(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get("prompt"), row.get("completions")], sort_keys=True, default=str)


def _default_quality(recipe: Recipe, rows: Sequence[dict]) -> str:
    """The metric that `quality` means: ranking accuracy where the objective requires pairs, else the loss."""
    objective = recipe.aim()
    if objective is not None and "pairs" in requirements(objective) and "pairs" in columns_of(rows):
        return "ranking_accuracy"
    return "loss"


# ------------------------------------------------------------------------------------ evaluators


def _choose_evaluators(
    recipe: Recipe, rows: Sequence[dict], goals: Sequence[Goal], limits: Sequence[Limit], quality: str
) -> tuple[Recipe, list[str]]:
    """The recipe with the evaluators that its goals require and no others, since each run is evaluated twice;
    and the usual ones beyond these, which measure the chosen configurations at the end.
    """
    metrics = {quality}
    for limit in limits:
        metrics.add(limit.metric)
    for goal in goals:
        metrics.update(goal.front or (goal.metric,))
    available = _available(recipe, rows) | {"reference"}
    chosen: list[str] = []
    for metric in sorted(metrics):
        name = evaluator_of(metric)
        if name is None or name in chosen:
            continue
        try:
            evaluator = build("evaluator", name)
        except RecipeError:
            continue  # it needs settings: the recipe or its plan brings it
        lacking = requirements(evaluator) - available
        if lacking:
            raise RecipeError(
                f"--goals: '{metric}' is measured by evaluator '{name}', which requires"
                f" {', '.join(sorted(lacking))}; this recipe does not provide it"
            )
        chosen.append(name)
    recipe = recipe.but(evaluate=chosen)
    available = _available(recipe, rows)
    usual = []
    for name in DEFAULT_EVALUATORS:
        if name not in chosen and requirements(build("evaluator", name)) <= available:
            usual.append(name)
    return recipe, usual


def _available(recipe: Recipe, rows: Sequence[dict]) -> set[str]:
    """What evaluators may require of a recipe's methods and its rows."""
    built = dry_run(first_run(recipe), rows)
    available = set(columns_of(rows) | built.architecture.provides | built.estimator.provides)
    return available | provides_of(built.tuner) | set(built.roles)


# ------------------------------------------------------------------------------------- the space


def _check_space(search_space: SearchSpace, rows: Sequence[dict]) -> None:
    """Validate every choice of methods once, and both ends of every range."""
    space = search_space.space
    start = space.start()
    for dim in space.dims:
        if dim.name not in search_space.methods:
            continue
        for value in dim.choices:
            try:
                recipe = search_space.recipe_of(space.active({**start, dim.name: value}))
                if recipe.plan is not None:
                    validate(recipe, rows, sample_rows)
                dry_run(first_run(recipe), rows)
            except RecipeError as error:
                raise RecipeError(f"--space {dim.name}={value}: {error}", error.code) from None
    for end in (0.0, 1.0):
        point = {d.name: d.at(end) for d in space.dims if not d.choices}
        recipe = search_space.recipe_of(space.active(point))
        recipe.methods()
        recipe.aim()


def _earlier_points(folder: str | Path, search_space: SearchSpace) -> tuple[dict[str, Any], ...]:
    """Points that an earlier search chose, as far as this space has their settings."""
    path = Path(folder) / RESULT
    if not path.is_file():
        raise RecipeError(f"--from: {folder} has no finished search ({RESULT})")
    points: list[dict[str, Any]] = []
    for candidate in read_result(path)["chosen"]:
        earlier = candidate["point"]
        point = search_space.space.active(earlier)
        shared = [name for name in point if name in earlier and earlier[name] == point[name]]
        if shared and point not in points:
            points.append(point)
    if not points:
        raise RecipeError(
            f"--from: the configurations in {folder} have no setting in common with this search"
        )
    return tuple(points)
