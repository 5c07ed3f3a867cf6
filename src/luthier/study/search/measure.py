"""A configuration measured: runs on every tuning seed, and the numbers that they end with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.errors import NotFinite, NothingMoves, OutOfMemory, RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import did_you_mean
from luthier.report.numbers import format_metric
from luthier.run.report import plan_runs
from luthier.storage import files
from luthier.study.goals import Goal, beyond_worst, front_figure
from luthier.study.search.spec import SearchSpec
from luthier.study.search.trials import Measurement
from luthier.study.space import LAYERS

NO_NUMBERS = (NotFinite, OutOfMemory, NothingMoves)  # ends of a run that do not end the search
WEIGHTS = ("checkpoint-*", "*.safetensors", "*.bin")  # files of a run that will not be resumed


def measure(
    spec: SearchSpec,
    folder: Path,
    t: Any,
    number: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Measurement:
    """Run a configuration on every tuning seed, up to its share of the steps.

    t: Optuna's trial. number: of the configuration; its runs lie in FOLDER/trials/NUMBER-SEED. progress:
    called with a line about each run but the last, after which the configuration has one of its own.
    Raises RecipeError for a run that ends without numbers, unless the configuration is the cause.
    """
    point, share = t.user_attrs["point"], t.user_attrs["share"]
    is_recipe = t.user_attrs["kind"] == "recipe"
    recipe = spec.space.recipe if is_recipe else spec.space.recipe_of(point)
    by_seed: dict[int, dict[str, float]] = {}
    began = time.perf_counter()
    for seed in spec.seeds:
        run = folder / "trials" / f"{number}-{seed}"
        label = f"configuration {number} ({describe(point) or 'the unchanged recipe'}), seed {seed}"
        try:
            if not (run / "report.json").is_file():
                perform(spec, recipe.but(seed=seed), run, share)
        except RecipeError as error:
            if isinstance(error, NO_NUMBERS) and not is_recipe:
                return Measurement({}, time.perf_counter() - began, str(error), error.code)
            raise RecipeError(f"{label}: {error}", error.code) from None
        by_seed[seed] = read_metrics(run, spec.goals)
        if len(by_seed) < len(spec.seeds):
            progress(f"{number}. seed {seed}: {_goal_values(spec, by_seed[seed])}")
        for goal in spec.goals:
            beyond = beyond_worst(goal, read_points(run))
            if beyond:
                raise RecipeError(
                    f"{label}: {beyond}, which all configurations share; start the search again"
                    " with a reference point that is worse than any of them"
                )
        if is_recipe:
            _check_goals(spec, by_seed[seed])
    if share >= 1:
        remove_weights(spec, folder, number)
    return Measurement(by_seed, time.perf_counter() - began)


def _goal_values(spec: SearchSpec, metrics: Mapping[str, float]) -> str:
    """'loss 1.23, memory 412 MB' of a run."""
    values = []
    for goal in spec.goals:
        if goal.metric in metrics:
            values.append(f"{goal.name} {format_metric(goal.metric, metrics[goal.metric])}")
    return ", ".join(values)


def perform(spec: SearchSpec, recipe: Recipe, run: Path, share: float) -> None:
    """One run, up to a share of its steps. Raises what it ends with."""
    stop_at = share if share < 1 else None
    if spec.subprocesses:
        from luthier.run import subprocess

        keys = {key: value for key, value in recipe.public().items() if key != "output_dir"}
        subprocess.tune(keys, run, stop_at)
    else:
        from luthier.run.run import perform

        perform(recipe, run, stop_at=stop_at)


def _check_goals(spec: SearchSpec, metrics: Mapping[str, float]) -> None:
    """The recipe as it is runs first: a goal that it does not measure is refused then."""
    for aim in (*spec.goals, *spec.limits):
        if aim.metric not in metrics:
            name = aim.name if isinstance(aim, Goal) else aim.text
            hint = did_you_mean(aim.metric, metrics)
            raise RecipeError(
                f"'{name}': the recipe does not measure '{aim.metric}'{hint}; add its evaluator"
                " under `evaluate`"
            )


def remove_weights(spec: SearchSpec, folder: Path, number: int) -> None:
    """Of a configuration that will not be resumed only the numbers are of use."""
    for seed in spec.seeds:
        run = folder / "trials" / f"{number}-{seed}"
        for pattern in WEIGHTS:
            for path in run.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


# ---------------------------------------------------------------------------- what runs ended with


def read_metrics(run: Path, goals: Sequence[Goal] = ()) -> dict[str, float]:
    """Every number of a finished or paused run, and the figures of fronts that goals name."""
    report, last = _read_report(run)
    stats = dict(report.get("stats", {}))
    if "moving" in stats:
        stats["trained"] = stats["moving"]
    metrics: dict[str, float] = {}
    for name, value in {**stats, **last}.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            metrics[name] = float(value)
    for goal in goals:
        figure = front_figure(goal, read_points(run)) if goal.front else None
        if figure is not None:
            metrics[goal.metric] = figure
    return metrics


def read_points(run: Path) -> list[dict[str, float]]:
    """What each run of a plan measured; of a single run, what it measured."""
    report, last = _read_report(run)
    points = []
    for part in plan_runs(report):
        path = part / "report.json"
        if path.is_file():
            points.append(files.read_object(path, after=dict)["after"])
    return points or [last]


def _read_report(run: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """The report of a finished or paused run, and what it measured last."""
    finished = run / "report.json"
    if finished.is_file():
        report = files.read_object(finished, after=dict)
        return report, report["after"]
    report = files.read_object(run / "paused.json", metrics=dict)
    return report, report["metrics"]


def describe(point: Mapping[str, Any]) -> str:
    """'tuner lora, lora.r 16, learning_rate 0.003'; layers as the list of those that are tuned."""
    parts, layers = [], None
    for name, value in point.items():
        key, _, layer = name.partition(".")
        if key == LAYERS and layer:
            layers = layers or []
            if value:
                layers.append(layer)
        elif isinstance(value, float):
            parts.append(f"{name} {value:.3g}")
        else:
            parts.append(f"{name} {value}")
    if layers is not None:
        parts.append(f"layers {' '.join(layers) or 'none'}")
    return ", ".join(parts)
