"""Run folders that luthier 0.1 began. Its recipes had other keys, and columns of rows and metrics other
names; the computation is the same, so that such a run goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from luthier.data.load import Data
from luthier.errors import Damaged, RecipeError
from luthier.methods.roles._base import PREFIX
from luthier.recipe.aliases import FORMER_ROLES
from luthier.recipe.recipe import NOT_THE_RUN, Recipe
from luthier.registry import former_metrics, provides_of
from luthier.storage import checkpoints, files
from luthier.storage.bounded_yaml import load_yaml, read_yaml
from luthier.storage.layout import BEFORE, ROWS, write_state
from luthier.storage.toy import OLD_PREFIX, current_row
from luthier.storage.toy import PREFIX as TASK_PREFIX

RECIPE = "recipe.yaml"


def began_by_first_edition(folder: Path, state: Mapping[str, Any], recipe: Recipe, data: Data) -> bool:
    """Whether the run in a folder is this recipe's on these rows, begun by version 0.1.

    state: the folder's run.json.
    """
    if state["data"] not in (data.fingerprint, data.former_fingerprint()):
        return False
    return same_recipe(folder, state, recipe)


def same_recipe(folder: Path, state: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether the recipe in a folder, in the keys and names of version 0.1, is this one.

    The fingerprint in `state` must be that of the recipe which lies beside it, so that a recipe edited by
    hand does not pass for the one that ran.
    """
    values = read_recipe(folder)
    if values is None or former_fingerprint(values) != state["fingerprint"]:
        return False
    former = in_current_names(values)
    return former is not None and former.fingerprint() == renamed(recipe).fingerprint()


def is_first_edition(folder: Path) -> bool:
    """Whether the recipe in a folder has keys that only version 0.1 wrote; a look that costs little."""
    try:
        text = files.read_text(folder / RECIPE)
    except Damaged:
        return False
    return "\nlive:" in text


def upgrade_folder(folder: Path, state: Mapping[str, Any], recipe: Recipe, data: Data) -> dict[str, Any]:
    """Rewrite what such a folder holds under today's names. Returns its run.json, which goes last but for
    the recipe: a kill in between leaves a folder that is upgraded again.
    """
    if (folder / BEFORE).is_file():
        files.write_json(folder / BEFORE, rename_metrics(files.read_object(folder / BEFORE)))
    methods = recipe.methods()
    upgrade_rows(folder / ROWS, methods["stages"])
    for path in checkpoints.paths(folder):
        upgrade_rows(checkpoints.draw_file(path), [*methods["stages"], *methods["online_stages"]])
    upgrade_tensors(folder, recipe)
    state = {**state, "fingerprint": recipe.fingerprint(), "data": data.fingerprint}
    write_state(folder, state)
    files.write_text(folder / RECIPE, recipe.yaml())
    return state


# ----------------------------------------------------------------------------------------------- recipes


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe that lies in a run's folder, as it was written; None where there is none to be read."""
    try:
        values = read_yaml(folder / RECIPE)
    except RecipeError:
        return None
    return values if isinstance(values, dict) else None


def recipe_in_current_names(folder: Path) -> dict[str, Any]:
    """The recipe that lies in a run's folder in today's keys, as plain data; as it was written where it is no
    recipe any more.
    """
    values = read_recipe(folder) or {}
    recipe = in_current_names(values)
    return values if recipe is None else load_yaml(recipe.yaml())


def former_fingerprint(values: Mapping[str, Any]) -> str:
    """What version 0.1 made of a recipe that it had written out in full."""
    part = {key: value for key, value in values.items() if key not in NOT_THE_RUN}
    text = json.dumps(part, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def in_current_names(values: Mapping[str, Any]) -> Recipe | None:
    """A recipe in the keys of version 0.1, read through the aliases; None where it is none any more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody wrote these names today
        try:
            recipe = Recipe.load(rename_tasks(values))
            recipe.methods()
        except RecipeError:
            return None
    return recipe


def renamed(recipe: Recipe) -> Recipe:
    """A recipe whose toy models and tasks are called toy:NAME throughout."""
    return Recipe.load(rename_tasks(recipe.public()))


def rename_tasks(value: Any) -> Any:
    """practice:NAME -> toy:NAME, at any depth."""
    if isinstance(value, Mapping):
        return {key: rename_tasks(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rename_tasks(item) for item in value]
    if isinstance(value, str) and value.startswith(OLD_PREFIX):
        return TASK_PREFIX + value.removeprefix(OLD_PREFIX)
    return value


# ------------------------------------------------------------------------------------------ what it holds


def rename_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under the names that they have now."""
    former = former_metrics()
    out = {}
    for name, value in metrics.items():
        family, slash, part = name.partition("/")
        out[former.get(family, family) + slash + part] = value
    return out


def upgrade_rows(path: Path, stages: Iterable[Any]) -> None:
    """Columns of toy tasks, and those that these stages wrote, under the names that they have now."""
    former = {}
    for stage in stages:
        for column in provides_of(stage):
            if getattr(column, "former", ""):
                former[column.former] = str(column)
    if not path.is_file():
        return
    rows = []
    for row in map(current_row, files.read_rows(path)):
        rows.append({former.get(key, key): value for key, value in row.items()})
    files.write_rows(path, rows)


def upgrade_tensors(folder: Path, recipe: Recipe) -> None:
    """Tensors that a role brought carry its name, which may have been another."""
    prefixes = {}
    for old, new in FORMER_ROLES.items():
        if new in recipe.roles:
            prefixes[f"{PREFIX}{old}."] = f"{PREFIX}{new}."
    if not prefixes:
        return
    for path in checkpoints.paths(folder):
        moment = checkpoints.load(path)
        moment.tensors = rename_prefixes(moment.tensors, prefixes)
        moment.state = rename_prefixes(moment.state, prefixes)
        checkpoints.save(folder, moment, recipe.save_total_limit)


def rename_prefixes(named: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """The same mapping, with keys that begin with a former prefix under the new one."""
    out = {}
    for name, value in named.items():
        for old, new in prefixes.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        out[name] = value
    return out
