"""What a search has found: the configurations chosen on tuning seeds, run again on test seeds beside the
recipe as it was; the numbers of both, the gap between them, and the answer in a sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import date
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from luthier.methods.searchers._base import Dim, best_first, pareto_ranks
from luthier.registry import spec as plain
from luthier.report.numbers import format_metric, format_number
from luthier.storage import files
from luthier.study.compare import ALPHA, ComparisonSpec, run_comparison
from luthier.study.goals import Goal, beyond_worst
from luthier.study.search.measure import describe, read_metrics, read_points
from luthier.study.search.spec import SearchSpec
from luthier.study.search.trials import Trial, full_runs
from luthier.study.statistics import holm, hypervolume, paired_difference, t_interval

CHOSEN = 3  # configurations that run again on test seeds
RECIPE = "recipe"  # the arm of the recipe as it was
REFERENCE = 1.1  # of goals scaled to 0..1: from where the volume of a choice is taken


# ------------------------------------------------------------------------ chosen on tuning seeds


def choose(trials: Sequence[Trial], most: int = CHOSEN) -> list[Trial]:
    """Of complete trials within the limits that are no worse than the recipe: the best, or of several goals
    those of the front that cover most of it. The recipe itself is not one.

    Equal ones are ordered by their points, so that the order in which they were measured decides nothing.
    """
    by_number: dict[int, Trial] = {}
    for trial in trials:
        if trial.feasible and all(map(math.isfinite, trial.observation.values)):
            by_number[trial.observation.number] = trial
    recipes = [trial for trial in by_number.values() if trial.kind == RECIPE]
    candidates = []
    for trial in by_number.values():
        if trial.kind != RECIPE and not any(_is_worse(trial, recipe) for recipe in recipes):
            candidates.append(trial)
    candidates.sort(key=lambda t: json.dumps(dict(t.observation.point), sort_keys=True, default=str))
    if not candidates:
        return []
    if len(candidates[0].observation.values) == 1:
        best = best_first([trial.observation for trial in candidates])[:most]
        return [by_number[observation.number] for observation in best]
    return _cover(candidates, most)


def _is_worse(trial: Trial, recipe: Trial) -> bool:
    """Is a configuration worse than the recipe: in no goal better, and in some worse?"""
    pairs = list(zip(trial.observation.values, recipe.observation.values))
    return all(ours >= theirs for ours, theirs in pairs) and any(ours > theirs for ours, theirs in pairs)


def _cover(candidates: Sequence[Trial], most: int) -> list[Trial]:
    """Of the front: the best in the first goal, then always the one that adds most volume."""
    values = _values(candidates)
    low, high = values.min(0), values.max(0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    front = np.flatnonzero(pareto_ranks(values) == 0).tolist()
    chosen = [min(front, key=lambda i: candidates[i].observation.values[0])]
    while len(chosen) < min(most, len(front)):
        volumes = {}
        for i in front:
            if i not in chosen:
                volumes[i] = hypervolume(scaled[[*chosen, i]], [REFERENCE] * values.shape[1])
        chosen.append(max(volumes, key=volumes.__getitem__))
    return [candidates[i] for i in chosen]


def front_numbers(trials: Sequence[Trial]) -> list[int]:
    """Numbers of the complete trials within the limits that no other dominates."""
    feasible = [trial for trial in trials if trial.feasible]
    if not feasible:
        return []
    front = np.flatnonzero(pareto_ranks(_values(feasible)) == 0)
    return sorted({feasible[i].observation.number for i in front})


def _values(trials: Sequence[Trial]) -> np.ndarray:
    """[trials, goals], the smaller the better."""
    return np.array([trial.observation.values for trial in trials])


def unmoved(goals: Sequence[Goal], trials: Sequence[Trial]) -> list[str]:
    """Notes of goals that came out alike in all complete trials, where there are several."""
    complete = {trial.observation.number: trial.goals for trial in trials if trial.complete}
    notes = []
    for goal in goals:
        values = set(map(itemgetter(goal.name), complete.values()))
        if len(complete) > 1 and len(values) == 1:
            notes.append(
                f"{goal.name} was {format_number(min(values))} in all {len(complete)}"
                " configurations: no setting in the search space changes it"
            )
    return notes


# ----------------------------------------------------------------------------- tested on test seeds


def judge(
    spec: SearchSpec, folder: Path, trials: Sequence[Trial], chosen: Sequence[Trial], callback: Any
) -> dict[str, Any]:
    """The result of a search as plain data. Runs the chosen configurations and the recipe on test seeds, and
    writes the former as FOLDER/found-1.yaml, found-2.yaml, ...
    """
    result = _summary(spec, folder, trials)
    if not chosen:
        result["sentence"] = _nothing_chosen(trials)
        return result
    arms = {RECIPE: spec.space.recipe}
    for i, trial in enumerate(chosen):
        name, point = f"found-{i + 1}", trial.observation.point
        arms[name] = spec.space.recipe_of(point)
        text = f"# Found by luthier search: {describe(point)}.\n{arms[name].but(output_dir=None).yaml()}"
        files.write_text(folder / f"{name}.yaml", text)
    callback.stage("on test seeds")
    rows = {}
    if spec.test_data is not None:
        rows["eval_data"] = spec.test_data
    for name, recipe in arms.items():
        arms[name] = recipe.but(evaluate=[*(recipe.evaluate or ()), *spec.evaluate], **rows)
    comparison_spec = ComparisonSpec(
        arms,
        len(spec.test_seeds),
        metric=spec.quality,
        stop_early=False,
        subprocesses=spec.subprocesses,
        seed_values=spec.test_seeds,
    )
    test_folder = folder / f"test-{comparison_spec.fingerprint()}"
    comparison = run_comparison(comparison_spec, test_folder, callback)
    tested = [trial for trial in trials if trial.kind == RECIPE][:1]
    names = list(arms) if tested else list(arms)[1:]
    lines = []
    for name, trial in zip(names, [*tested, *chosen]):
        finished = []
        for run in map(Path, comparison["arms"][name]["runs"]):
            if (run / "report.json").is_file():
                finished.append(run)
        lines.append(_line(spec, name, trial, finished))
        comparison["notes"] += _notes_beyond(spec, finished)
    add_intervals(lines)
    comparison["notes"] += unmoved(spec.goals, trials)
    result["baseline"], result["chosen"] = _split(lines)
    result["comparison"] = comparison
    result["sentence"] = sentence(spec, trials, lines, comparison)
    return result


def _nothing_chosen(trials: Sequence[Trial]) -> str:
    """Why nothing is tested on test seeds."""
    others = {trial.observation.number for trial in trials if trial.feasible and trial.kind != RECIPE}
    if not others:
        return "No configuration other than the recipe itself finished within the constraints."
    count = f"none of {len(others):,} other configurations is" if len(others) > 1 else "the other one is not"
    return f"The recipe as it is remains the best: {count} as good on the tuning seeds."


def _split(lines: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The line of the recipe, None where there is none, and those of chosen configurations."""
    recipe, chosen = None, []
    for line in lines:
        if line["name"] == RECIPE:
            recipe = line
        else:
            chosen.append(line)
    return recipe, chosen


def _summary(spec: SearchSpec, folder: Path, trials: Sequence[Trial]) -> dict[str, Any]:
    """Of a result: what is known before anything is tested."""
    return {
        "recipe": spec.space.recipe.yaml(),
        "goals": [
            {"name": goal.name, "metric": goal.metric, "higher_is_better": goal.up} for goal in spec.goals
        ],
        "limits": [limit.text for limit in spec.limits],
        "space": list(map(dimension_of, spec.space.space.dims)),
        "sampler": plain(spec.searcher),
        "seeds": list(spec.seeds),
        "test_seeds": list(spec.test_seeds),
        "test_data": spec.test_data,
        "trials": [_trial(trial, folder) for trial in trials],
        "front": front_numbers(trials),
        "full_runs": full_runs(trials),
        "seconds": sum(trial.measurement.seconds for trial in trials),
        "date": str(date.today()),
        "folder": str(folder),
        "model": spec.space.recipe.model,
        "chosen": [],
        "comparison": None,
    }


def _trial(trial: Trial, folder: Path) -> dict[str, Any]:
    observation, measurement = trial.observation, trial.measurement
    by_seed, runs = {}, []
    for seed, metrics in measurement.by_seed.items():
        by_seed[str(seed)] = dict(metrics)
        runs.append(str(folder / "trials" / f"{observation.number}-{seed}"))
    return {
        "number": observation.number,
        "point": dict(observation.point),
        "description": describe(observation.point) or "the unchanged recipe",
        "share": observation.share,
        "goals": _finite(trial.goals),
        "violation": observation.violation,
        "by_seed": by_seed,
        "seconds": measurement.seconds,
        "failed": measurement.failed,
        "kind": trial.kind,
        "runs": runs,
    }


def dimension_of(dim: Dim) -> dict[str, Any]:
    row: dict[str, Any] = {"name": dim.name}
    if dim.choices:
        row["choices"] = list(dim.choices)
    else:
        row |= {"low": dim.low, "high": dim.high, "log": dim.log}
    if dim.when:
        row["when"] = list(dim.when)
    return row


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _line(spec: SearchSpec, name: str, trial: Trial, runs: Sequence[Path]) -> dict[str, Any]:
    """An arm on tuning and on test seeds, goal by goal. runs: those on test seeds that finished."""
    ended = [read_metrics(run, spec.goals) for run in runs]
    tuning = _finite(trial.goals)
    test: dict[str, float] = {}
    gap: dict[str, float] = {}
    by_seed: dict[str, list[float]] = {}
    for goal in spec.goals:
        values = [metrics[goal.metric] for metrics in ended if goal.metric in metrics]
        if not ended or len(values) < len(ended) or not all(map(math.isfinite, values)):
            continue
        test[goal.name] = float(np.mean(values))
        if goal.front:
            by_seed[goal.name] = values
        if tuning[goal.name] is not None:
            loss = trial.goals[goal.name] - test[goal.name]
            gap[goal.name] = loss if goal.up else -loss
    return {
        "name": name,
        "number": trial.observation.number,
        "point": dict(trial.observation.point),
        "description": describe(trial.observation.point),
        "tuning": tuning,
        "test": test,
        "gap": gap,
        "by_seed": by_seed,
    }


def _notes_beyond(spec: SearchSpec, runs: Sequence[Path]) -> list[str]:
    """Notes of runs whose front reaches beyond the point from which its volume is taken."""
    notes = []
    for run in runs:
        for goal in spec.goals:
            beyond = beyond_worst(goal, read_points(run))
            if beyond:
                notes.append(f"{run.name}: {beyond}; points beyond it add nothing to the hypervolume")
    return notes


def add_intervals(lines: Sequence[dict[str, Any]]) -> None:
    """Adds to each line the intervals of its fronts' means over test seeds, `interval`, and to those of
    chosen configurations the paired difference from the recipe, `beyond`. p values are Holm's, over all
    chosen configurations.
    """
    for goal in lines[0]["by_seed"] if lines else ():
        several = [line for line in lines if len(line["by_seed"].get(goal, ())) > 1]
        for line in several:
            line.setdefault("interval", {})[goal] = t_interval(line["by_seed"][goal])
        recipe, chosen = _split(several)
        if recipe is None:
            continue
        base = np.array([recipe["by_seed"][goal]]).T
        compared, differences = [], []
        for line in chosen:
            column = np.array([line["by_seed"][goal]]).T
            if len(column) == len(base):
                compared.append(line)
                differences.append(paired_difference(column, base))
        corrected = holm([difference.p for difference in differences])
        for line, difference, p in zip(compared, differences, corrected):
            line.setdefault("beyond", {})[goal] = {
                "mean": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "p": p,
                "apart": bool(p < ALPHA and difference.excludes_zero),
            }


# ----------------------------------------------------------------------------------- in a sentence


def sentence(
    spec: SearchSpec, trials: Sequence[Trial], lines: Sequence[dict[str, Any]], comparison: Mapping
) -> str:
    """The answer on test seeds, and of one goal the number on tuning seeds beside it."""
    goal = spec.goals[0]
    numbers = {trial.observation.number for trial in trials}
    begin = f"{len(numbers)} configurations, {full_runs(trials):.3g} full runs: "
    if goal.front and len(lines) > 1:
        return f"{begin}{_front_sentence(goal, lines)}."
    verdict = comparison["sentence"]
    text = begin + verdict[0].lower() + verdict[1:].rstrip(".")
    best = _best_on_test(goal, lines)
    if best is not None and goal.name in best["test"]:
        seeds = "test seeds" if spec.test_data is None else "test seeds and rows"
        tuning = format_metric(goal.metric, best["tuning"][goal.name])
        test = format_metric(goal.metric, best["test"][goal.name])
        text += f" ({seeds}; {best['name']} had {tuning} on the tuning seeds, {test} here)"
    return f"{text}."


def _best_on_test(goal: Goal, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The chosen configuration that is best in a goal on test seeds."""
    _, chosen = _split(lines)
    if not chosen:
        return None
    return min(chosen, key=lambda line: goal.value({goal.metric: line["test"].get(goal.name, math.nan)}))


def _front_sentence(goal: Goal, lines: Sequence[dict[str, Any]]) -> str:
    """The first chosen configuration beside the recipe, on test seeds, by a figure of their fronts."""
    recipe, (best, *_) = _split(lines)
    text = f"{goal.name} on test seeds: {_with_interval(goal, best)}"
    if recipe is None:
        return text
    text += f", {_with_interval(goal, recipe)}"
    difference = best.get("beyond", {}).get(goal.name)
    if difference is None:
        return f"{text}; too few seeds to tell the difference from chance"
    if not difference["apart"]:
        return f"{text}; no significant difference"
    size = format_number(abs(difference["mean"]))
    low, high = sorted((abs(difference["low"]), abs(difference["high"])))
    word = "better" if (difference["mean"] > 0) == goal.up else "worse"
    return f"{text}; {word} by {size} ({format_number(low)} to {format_number(high)})"


def _with_interval(goal: Goal, line: Mapping) -> str:
    text = f"{line['name']} {format_number(line['test'].get(goal.name))}"
    low, high = line.get("interval", {}).get(goal.name, (0, 0))
    if low < high:
        text += f" ({format_number(low)} to {format_number(high)})"
    return text
