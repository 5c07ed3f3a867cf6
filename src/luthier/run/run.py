"""From a recipe to a run folder: prepare, train, finish.

A run that was stopped, however roughly, goes on when the same recipe is run again; a finished one answers at
once.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from luthier import compat
from luthier.compat import caller
from luthier.errors import RecipeError
from luthier.processes import group
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import build_methods, check_roles
from luthier.report.console import Callback
from luthier.run.finish import finish
from luthier.run.folder import default_folder, write_inline_rows
from luthier.run.plan import perform_plan
from luthier.run.prepare import prepare
from luthier.run.report import Report
from luthier.run.session import open_session
from luthier.run.training import train


@compat.session()
@caller.restored()
@group.together()
def perform(
    recipe: Recipe,
    folder: str | Path | None = None,
    callback: Any = None,
    overwrite: bool | None = None,
    stop_at: float | None = None,
    of_plan: bool = False,
) -> Report:
    """A recipe, or the plan it carries, to its end or to where it pauses.

    callback: hears what happens (report.console.Callback). overwrite: do again what is finished; by default
    where the recipe says so. stop_at: pause at this step; below 1 a share of the run. of_plan: a run of a
    plan may leave roles unused that others of its runs require. Raises RecipeError.
    """
    folder = Path(folder or recipe.output_dir or default_folder(recipe))
    if overwrite is None:
        overwrite = recipe.overwrite
    if recipe.plan is None and not of_plan:
        check_roles(recipe, build_methods(recipe).require())
    recipe = write_inline_rows(recipe, folder)
    if recipe.plan is not None:
        if stop_at is not None:
            raise RecipeError(
                "stop_at: a plan consists of several runs, so it has no single step to pause at;"
                " leave stop_at out"
            )
        play = partial(perform, of_plan=True)
        return perform_plan(recipe, folder, callback or Callback(), overwrite, play)
    with open_session(recipe, folder, callback, overwrite, stop_at) as session:
        if isinstance(session, Report):
            return session
        return finish(train(prepare(session))).report


def tune(
    recipe: Any = None,
    *,
    folder: str | Path | None = None,
    callback: Any = None,
    stop_at: float | None = None,
    watch: Any = None,
    **settings: Any,
) -> Report:
    """Fine-tune a model, and evaluate it before and after. A run that was stopped resumes.

    Args:
        recipe: a YAML file, YAML text, a mapping, a `Recipe` or "toy:TASK"; None: `settings` alone.
        folder: the run's folder, in place of the recipe's `output_dir`.
        callback: an object with the methods of `luthier.report.console.Callback`, called as the run goes on.
        stop_at: pause at this step, below 1 at this share of the steps; the next call continues.
        watch: the former name of `callback`.
        settings: keys of the recipe, such as `tuner="lora"`, `learning_rate=1e-4`.

    Returns:
        metrics before and after, the loss of each logged step, and the folder.

    Raises:
        RecipeError: the recipe cannot work; its subclasses say which outcome it was.

    Examples:
        >>> luthier.tune(model="toy:lm", data="rows.jsonl", tuner="lora", objective="sft")
    """
    if watch is not None:
        warnings.warn(
            "luthier.tune: the argument watch is now called callback", DeprecationWarning, stacklevel=2
        )
        callback = callback or watch
    with group.together():
        return perform(Recipe.load(recipe, settings), folder, callback, stop_at=stop_at)
