"""Public benchmarks by name, through lm-eval: a tuned model and its base on the same questions.

`evaluate` is what the command and Python call; `adapter.py` lets lm-eval ask a model of luthier, whatever
tuned it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.evaluators._base import paired_change
from luthier.model.loaded import Loaded, load
from luthier.recipe.recipe import Recipe
from luthier.report.benchmarks import RESULTS, read_benchmarks
from luthier.report.page import write_report
from luthier.run.report import Report
from luthier.storage import files
from luthier.storage.layout import REPORT, read_log

MISSING = "public benchmarks need lm-eval: pip install 'luthier[benchmarks]'"


def evaluate(
    run: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    base: str | Path | None = None,
    chat: bool = False,
    include: str | Path | None = None,
    shots: int | None = None,
) -> dict[str, Any]:
    """Measure a run's model and its base on tasks of lm-eval, paired by question.

    Args:
        run: the folder of a run; or any other model, which is compared with nothing unless `base` is given.
        tasks: names of lm-eval, such as "arc_easy".
        limit: questions of each task at most, the first ones.
        base: the model before, where it is not the run's own.
        chat: put questions through the chat template; lm-eval does not, and numbers with and without differ.
        include: a folder with tasks of one's own, as lm-eval's YAML.
        shots: examples before each question, where it is not the task's own number.

    Returns:
        {run, base, tasks, limit, chat, lm_eval, date, results}; each result is {task, metric, rows, after},
        with a base also {before, difference, low, high}: a paired interval at 95 %. Of a run it is also
        added to benchmarks.json in its folder, and to its report.

    Raises:
        RecipeError: lm-eval is not installed, there is no such task, its data cannot be had, or a model
            cannot be read.
    """
    try:
        import lm_eval
    except ImportError:
        raise RecipeError(MISSING) from None
    if not tasks:
        raise RecipeError("--tasks: name at least one task of lm-eval, such as arc_easy")
    folder = Path(run)
    recipe = Recipe.load(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else None
    if base is None and recipe is not None:
        base = recipe.model
    manager = _task_manager(include)
    _check_tasks(tasks, manager)
    settings = {"tasks": [*tasks], "limit": limit, "chat": chat, "shots": shots}
    before = None
    if base is not None:
        before = _measure(load(base), manager, **settings)
    after = _measure(load(run), manager, **settings)
    result = {
        "run": str(run),
        "base": None if base is None else str(base),
        **settings,
        "lm_eval": lm_eval.__version__,
        "date": str(date.today()),
        "results": _compare(before, after),
    }
    if recipe is not None:
        _keep(result, recipe, folder)
    return result


def _task_manager(include: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include is not None and not Path(include).is_dir():
        raise RecipeError(f"--include: {include} is no folder")
    return TaskManager(include_path=None if include is None else str(include))


def _check_tasks(tasks: Sequence[str], manager: Any) -> None:
    """Refuse a name that lm-eval does not know, before a model is loaded."""
    from luthier.registry import did_you_mean

    names = manager.all_tasks
    for task in tasks:
        if task not in names:
            raise RecipeError(f"--tasks: lm-eval has no task '{task}'{did_you_mean(task, names)}")


def _measure(
    loaded: Loaded, manager: Any, *, tasks: list[str], limit: int | None, chat: bool, shots: int | None
) -> dict[str, Any]:
    """What lm-eval makes of one model: its results and samples."""
    from lm_eval import simple_evaluate

    from luthier.serve.benchmarks.adapter import Adapter

    try:
        return simple_evaluate(
            model=Adapter(loaded, chat),
            tasks=tasks,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(f"lm-eval could not run {', '.join(tasks)}: {lines[0]}") from None


# ------------------------------------------------------------------------------------------ before and after


def _compare(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each task and metric."""
    lines = []
    for task, values in after["results"].items():
        for name, value in values.items():
            metric, _, method = name.partition(",")
            if not method or metric.endswith("_stderr") or not _is_number(value):
                continue
            line = {"task": task, "metric": metric, "filter": method, "after": float(value)}
            line["higher_is_better"] = after.get("higher_is_better", {}).get(task, {}).get(metric)
            mine = _by_question(after, task, metric, method)
            line["rows"] = len(mine) or int(after["n-samples"].get(task, {}).get("effective", 0))
            if before is not None:
                line["before"] = float(before["results"][task][name])
                line |= _change(_by_question(before, task, metric, method), mine, line)
            lines.append(line)
    return lines


def _by_question(measured: Mapping[str, Any], task: str, metric: str, method: str) -> dict[str, float]:
    """Question -> value; empty for a metric that is not the mean of its questions' values."""
    values = {}
    for sample in measured.get("samples", {}).get(task, ()):
        value = sample.get(metric)
        if sample.get("filter", method) == method and _is_number(value):
            values[str(sample["doc_id"])] = float(value)
    return values


def _change(before: dict[str, float], after: dict[str, float], line: Mapping[str, Any]) -> dict[str, float]:
    """The difference with its paired interval, where the metric is the mean over questions."""
    difference = {"difference": line["after"] - line["before"]}
    if len(after) < 2 or before.keys() != after.keys():
        return difference
    change = paired_change(before, after)
    if not math.isclose(change.after, line["after"], abs_tol=1e-6):
        return difference
    return {**difference, "low": change.low, "high": change.high}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# ------------------------------------------------------------------------------------ the run's folder


def _keep(result: dict[str, Any], recipe: Recipe, folder: Path) -> None:
    """Into benchmarks.json, in the place of an earlier result with the same tasks and settings; and the
    report once more.
    """
    settings = ("base", "tasks", "limit", "chat", "shots")
    same = {key: result[key] for key in settings}
    others = []
    for former in read_benchmarks(folder):
        if {key: former.get(key) for key in settings} != same:
            others.append(former)
    files.write_json(folder / RESULTS, {"benchmarks": [*others, result]})
    if (folder / REPORT).is_file():
        write_report(recipe, Report.read(folder), read_log(folder), folder)
