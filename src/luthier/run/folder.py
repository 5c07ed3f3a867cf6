"""A run's folder: whose it is, whether it is finished, what a new run may not overwrite. How files are
written is in storage/.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.data.load import Data
from luthier.data.sources import is_row
from luthier.errors import Damaged, RecipeError
from luthier.processes.group import Processes
from luthier.processes.lifeline import LOST
from luthier.recipe.recipe import NOT_THE_RUN, Recipe, plain
from luthier.registry import KINDS, cards
from luthier.run.report import Report
from luthier.run.upgrade import (
    began_by_first_edition,
    is_first_edition,
    read_recipe,
    recipe_in_current_names,
    rename_tasks,
    renamed,
    same_recipe,
    upgrade_folder,
)
from luthier.storage import checkpoints, files
from luthier.storage.bounded_yaml import load_yaml
from luthier.storage.failure import write_failure
from luthier.storage.layout import (
    BEFORE,
    BEST,
    DROPPED,
    FAILED,
    LOG,
    PAUSED,
    QUARANTINE,
    REPORT,
    ROWS,
    STAGE_METRICS,
    STAGES,
    STATE,
    STATUS,
    log_entry,
    read_state,
    state_is_unchanged,
    write_state,
)
from luthier.version import __version__

# of a run, beside its checkpoints and what its methods declare; run.json goes last
FILES = (
    REPORT,
    BEFORE,
    ROWS,
    STAGE_METRICS,
    DROPPED,
    LOG,
    QUARANTINE,
    PAUSED,
    FAILED,
    STATUS,
    "shown.json",
    "report.html",
)
DEFAULTED = ("learning_rate", "num_train_epochs")  # keys whose defaults have changed
PATTERNS = (
    "per_example-*.json",
    "logprob_cache-*.bin",
    "hidden_cache-*.bin",
    "by-row-*.json",  # from here on as version 0.1 called them
    "said-*.bin",
    "frozen-*.bin",
)


@dataclass(frozen=True)
class FolderState:
    """What a run finds in its folder."""

    finished: bool = False
    version: str = __version__  # of the luthier that began the run
    lock: files.FolderLock | None = None  # of the main process
    warnings: tuple[str, ...] = ()  # about what lies there


@contextmanager
def open_folder(
    folder: Path, recipe: Recipe, data: Data, main: bool, overwrite: bool
) -> Iterator[FolderState]:
    """A run's folder for oneself, as long as the run lasts.

    main: is this the main process? Others look at nothing. overwrite: start over where the same run is
    finished. Raises RecipeError where the folder holds another run, or another process is running in it.
    """
    if not main:
        yield FolderState()
        return
    with files.exclusive(folder) as lock:
        state = _read_state(folder, recipe, data, overwrite)
        warnings = []
        if state is None:
            state = {
                "fingerprint": recipe.fingerprint(),
                "data": data.fingerprint,
                "finished": False,
                "version": __version__,
            }
            files.write_text(folder / "recipe.yaml", recipe.yaml())
            write_state(folder, state)
        elif not state_is_unchanged(state):
            warnings.append(f"{folder / STATE} was changed after it was written: its checksum differs")
        (folder / FAILED).unlink(missing_ok=True)
        finished = state["finished"] and _is_readable(folder, warnings)
        if finished:  # it may have been killed before it could
            shutil.rmtree(folder / BEST, ignore_errors=True)
        yield FolderState(finished, state.get("version", "(unknown)"), lock, tuple(warnings))


def _is_readable(folder: Path, warnings: list[str]) -> bool:
    """Whether what a finished run left can be used; else why not, and it is made again from the checkpoint
    before.
    """
    if not (folder / REPORT).is_file():
        return False
    try:
        Report.read(folder)
    except Damaged as error:
        warnings.append(f"{error}; it is written again")
        return False
    newest = checkpoints.paths(folder)[-1:]
    # why it cannot be used is said when the run goes on from another
    return all(checkpoints.damage(path) is None for path in newest)


def _read_state(folder: Path, recipe: Recipe, data: Data, overwrite: bool) -> dict[str, Any] | None:
    """run.json where it is this run's and the run goes on; else None, and the folder is cleared."""
    if not (folder / STATE).is_file():
        if not checkpoints.paths(folder):
            return None
        if not recipe.overwrite:
            raise Damaged(
                f"{folder} holds checkpoints, but no {STATE} that says of which run; set another output_dir,"
                " or overwrite=true to delete them and start over"
            )
        clear(folder)
        return None
    try:
        state = read_state(folder)
    except Damaged as error:
        if recipe.overwrite:
            clear(folder)
            return None
        raise Damaged(f"{error}; set another output_dir, or overwrite=true to start over") from None
    same = (state["fingerprint"], state["data"]) == (recipe.fingerprint(), data.fingerprint)
    if not same and began_by_first_edition(folder, state, recipe, data):
        state = upgrade_folder(folder, state, recipe, data)
        same = True
    if same and not (overwrite and state["finished"]):
        return state
    # a run that was refused before it computed anything is no loss
    if not same and not recipe.overwrite and (folder / BEFORE).is_file():
        difference = _difference(folder, recipe, state, data)
        raise RecipeError(
            f"{folder} already holds another run ({difference}); set another output_dir, or"
            " overwrite=true to delete it and start over",
            "another_run",
        )
    clear(folder)
    return None


def _difference(folder: Path, recipe: Recipe, state: dict, data: Data) -> str:
    """In which keys two recipes differ, for a sentence."""
    there = recipe_in_current_names(folder)
    here = load_yaml(renamed(recipe).yaml())
    differences = []
    for key, value in here.items():
        if there.get(key) != value and key not in NOT_THE_RUN:
            differences.append(f"{key}: {str(there.get(key))[:40]} there, {str(value)[:40]} here")
    if differences:
        return "different settings: " + ", ".join(differences[:2])
    if state["data"] not in (data.fingerprint, data.former_fingerprint()):
        return "different rows"
    return "another luthier version"


def clear(folder: Path) -> None:
    """Leave nothing of a run. run.json goes last: while it stands, a folder that is half cleared is still the
    old run's.
    """
    for path in checkpoints.numbered(folder):
        checkpoints.remove(path)
    for name in (BEST, STAGES):
        shutil.rmtree(folder / name, ignore_errors=True)
    patterns = [*PATTERNS]
    for kind in KINDS:
        for card in cards(kind):
            patterns += [artifact.pattern for artifact in card.artifacts]
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    for name in (*FILES, STATE):
        (folder / name).unlink(missing_ok=True)


def rows_fingerprint(folder: Path) -> str:
    """That of the rows of the run in a folder; empty where there is none."""
    if not (folder / STATE).is_file():
        return ""
    try:
        return read_state(folder)["data"]
    except Damaged:  # said when the folder is opened
        return ""


def update_state(folder: Path, **facts: Any) -> None:
    """Facts about the run into run.json."""
    write_state(folder, {**read_state(folder), **facts})


def leave_failure(processes: Processes, folder: Path, error: Exception) -> None:
    """Leave failed.json, by the main process. Where that was killed, one of those that are left writes it;
    none where the folder is not there, or somebody else is at work in it.
    """
    if processes.main:
        write_failure(folder, error)
        return
    fault = processes.lifeline.fault if processes.lifeline else None
    if fault is not None and fault.rank == 0 and fault.code == LOST and folder.is_dir():
        with suppress(RecipeError), files.exclusive(folder):
            write_failure(folder, error)


def truncate_log(path: Path, step: int) -> int:
    """Delete the lines of steps that a kill has undone. Returns how many lines before them were damaged."""
    if not path.is_file():
        return 0
    lines, pending, lost = [], 0, 0
    for line in files.read_lines(path):
        entry = log_entry(line)
        if entry is None:  # the last one was being written when the process died
            pending += 1
        elif entry["step"] <= step:
            lines.append(line.decode().rstrip("\n") + "\n")
            lost += pending
            pending = 0
    files.write_text(path, "".join(lines))
    return lost


def default_folder(recipe: Recipe) -> Path:
    """runs/<model>-<tuner>-<objective>-<fingerprint>: the same recipe finds its run again, also one that
    version 0.1 began under a name of its own.
    """
    model = Path(recipe.model).name if "/" in recipe.model else recipe.model
    identity = f"{recipe.fingerprint()} {recipe.data} {recipe.eval_data}"
    words = [_slug(model), _slug(recipe.tuner), _slug(recipe.objective)]
    words.append(hashlib.sha256(identity.encode()).hexdigest()[:6])
    folder = Path("runs") / "-".join(filter(None, words))
    if not folder.exists():
        pattern = "-".join(["*", *filter(None, words[1:3]), "??????"])
        for path in sorted(Path("runs").glob(pattern)):
            if _began_before(path, recipe):
                return path
    return folder


def as_begun(folder: Path, recipe: Recipe) -> Recipe:
    """A recipe with the defaults under which its run in a folder began, where today's are others."""
    if not (folder / STATE).is_file():
        return recipe
    values = read_recipe(folder) or {}
    changed = {}
    for key in DEFAULTED:
        if recipe.origins.get(key) == "default" and key in values and values[key] != getattr(recipe, key):
            changed[key] = values[key]
    if not changed:
        return recipe
    try:
        state = read_state(folder)
    except Damaged:  # said when the folder is opened
        return recipe
    begun = replace(recipe, **changed)
    if state["fingerprint"] == begun.fingerprint() or same_recipe(folder, state, begun):
        return begun
    return recipe


def _began_before(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder holds this run, begun by version 0.1 or under other defaults."""
    if not (folder / STATE).is_file():
        return False
    recipe = as_begun(folder, recipe)
    try:
        state = read_state(folder)
    except Damaged:
        return False
    if state["fingerprint"] != recipe.fingerprint():
        if not is_first_edition(folder) or not same_recipe(folder, state, recipe):
            return False
    there = recipe_in_current_names(folder)
    for key in ("data", "eval_data"):
        value = getattr(recipe, key)
        if _are_rows(value):
            if Path(str(there[key])).name != _rows_file(key, value)[0]:
                return False
        elif rename_tasks(plain(value)) != there[key]:
            return False
    return True


def _slug(method: Any) -> str:
    """A method's name as part of a folder's name; `mix` of several."""
    if isinstance(method, dict):
        method = method.get("name", "")
    if not isinstance(method, str):
        method = "mix"
    return re.sub(r"[^A-Za-z0-9]+", "-", method).strip("-")


def write_inline_rows(recipe: Recipe, folder: Path) -> Recipe:
    """Rows given from Python are written beside the run, so that its recipe can be repeated from a shell."""
    for key in ("data", "eval_data"):
        rows = getattr(recipe, key)
        if _are_rows(rows):
            name, text = _rows_file(key, rows)
            files.write_text(folder.resolve() / name, text)
            recipe = replace(recipe, **{key: str(folder.resolve() / name)})
    return recipe


def _are_rows(value: Any) -> bool:
    """Whether a recipe's data are rows themselves, and not where they lie."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_row, value))


def _rows_file(key: str, rows: Any) -> tuple[str, str]:
    """Name and text of the file that rows are written to."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    text = "".join(lines)
    return f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl", text
