"""A run in a process of its own: its memory is its own, and what it leaves behind in a process is in nobody's
way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from luthier.errors import RecipeError
from luthier.storage import files
from luthier.storage.failure import OUTCOME_FILE, read_failure, read_outcome
from luthier.storage.layout import FAILED, LOG, log_entry

if TYPE_CHECKING:
    from luthier.recipe.recipe import Recipe


def tune(
    keys: Mapping[str, Any],
    folder: Path,
    stop_at: float | None = None,
    step: Callable[[int], None] | None = None,
) -> None:
    """`luthier tune` on a recipe's keys. Raises what the run ended with, as its type.

    step: called every half second with how many steps are logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder.with_suffix(".yaml")
    text = yaml.safe_dump({**keys, "output_dir": str(folder)}, sort_keys=False, allow_unicode=True)
    recipe.write_text(text, encoding="utf-8")
    program = [sys.executable, "-c", "from luthier.cli import main; main()", "tune", str(recipe), "--quiet"]
    if stop_at is not None:
        program += ["--stop-at", str(stop_at)]
    try:
        _wait_for(program, [folder], step)
    finally:
        recipe.unlink()


def side_by_side(runs: Sequence[tuple[Recipe, Path]], stop_at: float | None = None) -> None:
    """Runs that share a base in one process (run/batched.py). Raises what the first of them that
    failed ended with, as its type.
    """
    folders = [folder for _, folder in runs]
    listing = folders[0].with_name(f"{folders[0].name}-batched_runs.json")
    listing.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for recipe, folder in runs:
        keys = {k: v for k, v in recipe.public().items() if k != "output_dir"}
        entries.append([keys, str(folder)])
    listing.write_text(json.dumps({"runs": entries, "stop_at": stop_at}, default=str), encoding="utf-8")
    try:
        _wait_for([sys.executable, "-m", "luthier.run.batched", str(listing)], folders)
    finally:
        listing.unlink()


def _wait_for(
    program: Sequence[str], folders: Sequence[Path], step: Callable[[int], None] | None = None
) -> None:
    """Run a program to its end. Raises what it left in one of the folders, where it failed."""
    outcome = folders[0].with_name(f"{folders[0].name}-outcome.json")
    for path in (outcome, *(folder / FAILED for folder in folders)):
        path.unlink(missing_ok=True)  # of an earlier attempt
    # a shell stands between: a process begins with the peak of memory of the one that turned into it
    running = subprocess.Popen(
        ["sh", "-c", '"$@"; exit $?', "sh", *program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, OUTCOME_FILE: str(outcome.resolve())},
    )
    try:
        while step is not None and running.poll() is None:
            step(logged_steps(folders[0]))
            time.sleep(0.5)
        errors = running.communicate()[1]
    finally:
        # Ctrl-C reaches the run too; it saves nothing more than its last checkpoint
        if running.poll() is None:
            running.terminate()
            running.wait()
    refusal = read_outcome(outcome)
    outcome.unlink(missing_ok=True)
    if running.returncode:
        for folder in folders:
            if failure := read_failure(folder):
                raise failure
        if refusal:  # before it had a folder
            raise refusal
        # killed, or it crashed before it had a folder: its last line is all that is known
        lines = errors.strip().splitlines() or [f"the process ended with exit code {running.returncode}"]
        raise RecipeError(lines[-1], "crash")


def logged_steps(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    path = folder / LOG
    if not path.is_file():
        return 0
    for line in reversed(list(files.read_lines(path))[-2:]):
        if entry := log_entry(line):
            return entry["step"]
    return 0  # the first line is being written
