"""Plans: several runs as one. A plan is a generator; its state is the reports of the runs it asked for, so
that one that was stopped is gone through again, and finished runs answer at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.data.load import sample_rows
from luthier.errors import NO_ROWS, RecipeError
from luthier.processes import group
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import build
from luthier.run.folder import clear, leave_failure
from luthier.run.report import Report
from luthier.storage import files
from luthier.storage.layout import FAILED, REPORT, STATE, run_folder, run_folders


def perform_plan(
    recipe: Recipe, folder: Path, callback: Any, overwrite: bool, perform: Callable[..., Report]
) -> Report:
    """All runs of a recipe's plan, in folders of their own. Returns the last run's report, or the plan's own.

    perform: how a recipe is run. overwrite: do again what is finished; a plan that was stopped goes on all
    the same. Raises RecipeError, before the first run where a later one cannot work.
    """
    processes = group.current()
    if processes.main:
        _make_room(recipe, folder, overwrite)
    processes.wait_for_all()
    validate(recipe, sample_rows(recipe), sample_rows)
    if processes.main:
        (folder / FAILED).unlink(missing_ok=True)
    plan = build("plan", recipe.plan_spec())
    try:
        report = _perform_runs(plan, replace(recipe, plan=None), folder, callback, perform)
    except Exception as error:
        outcome = processes.agree(error)
        leave_failure(processes, folder, outcome)
        processes.wait_before_leaving()
        if outcome is error:
            raise
        raise outcome from error
    if processes.main:
        if page := plan.page(report):
            files.write_text(folder / "report.html", page)
        report.write(folder)
    processes.wait_for_all()
    return report


def _make_room(recipe: Recipe, folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a single run; delete a finished plan that shall be done again."""
    if (folder / STATE).is_file():
        if not recipe.overwrite:
            raise RecipeError(
                f"{folder} already holds a single run; set another output_dir for this plan, or"
                " overwrite=true to delete it and start over",
                "another_run",
            )
        clear(folder)
    if folder.is_dir():
        files.remove_leftovers(folder)
    if overwrite and (folder / REPORT).is_file():
        for run in run_folders(folder):
            shutil.rmtree(run)
        (folder / REPORT).unlink()


def _perform_runs(
    plan: Any, recipe: Recipe, folder: Path, callback: Any, perform: Callable[..., Report]
) -> Report:
    """The report that stands for the whole, with the folders of all runs."""
    runs: list[str] = []
    notes: list[str] = []
    last: Report | None = None
    play = plan.recipes(recipe)
    request = next(play)
    while True:
        reports: list[Report] = []
        empty: RecipeError | None = None
        for one in request if isinstance(request, list) else [request]:
            run = run_folder(folder, len(runs))
            callback.stage(f"run {len(runs)}")
            try:
                last = perform(replace(one, output_dir=None), run, callback, overwrite=False)
            except RecipeError as error:
                if error.code != NO_ROWS:
                    raise
                empty = error
                break
            reports.append(last)
            notes += last.notes
            runs.append(str(run))
        try:
            if empty is None:
                request = play.send(reports if isinstance(request, list) else reports[0])
            else:  # a plan that does not expect it lets it pass
                request = play.throw(empty)
        except StopIteration as end:
            final: Any = end.value or last
            if group.current().main:
                (run_folder(folder, len(runs)) / FAILED).unlink(missing_ok=True)
            return replace(final, runs=runs, notes=list(dict.fromkeys([*notes, *final.notes])))
