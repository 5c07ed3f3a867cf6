"""A run in a process of its own: its memory is its own, and what it leaves behind in a process is in nobody's
way.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.recipe.recipe import Recipe


def tune(
    keys: Mapping[str, Any],
    folder: Path,
    until: float | None = None,
    step: Callable[[int], None] | None = None,
) -> None:
    """`luthier tune` on a recipe's keys. step: hears how many steps are logged. Raises the sentence that the
    run ended with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(
        yaml.safe_dump({**keys, "output_dir": str(folder)}, sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )
    program = [sys.executable, "-c", "from luthier.cli import main; main()", "tune", str(recipe), "--quiet"]
    program += [] if until is None else ["--until", str(until)]
    try:
        _through(program, folder, step)
    finally:
        recipe.unlink()


def side_by_side(runs: Sequence[tuple[Recipe, Path]], until: float | None = None) -> None:
    """Runs that share a base in one process (luthier/fleet.py). Raises the sentence that it ended with."""
    first = runs[0][1]
    first.parent.mkdir(parents=True, exist_ok=True)
    listed = first.with_name(f"{first.name}-crew.json")
    told = [[{k: v for k, v in r.public().items() if k != "output_dir"}, str(folder)] for r, folder in runs]
    listed.write_text(json.dumps({"runs": told, "until": until}, default=str), encoding="utf-8")
    try:
        _through([sys.executable, "-m", "luthier.train.batched_lora", str(listed)])
    finally:
        listed.unlink()


def _through(
    program: Sequence[str], folder: Path | None = None, step: Callable[[int], None] | None = None
) -> None:
    """A shell stands between: a process begins with the peak of memory of the one that turned into it."""
    running = subprocess.Popen(
        ["sh", "-c", '"$@"; exit $?', "sh", *program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while step is not None and folder is not None and running.poll() is None:
            step(logged(folder))
            time.sleep(0.5)
        said = running.communicate()[1]
    finally:
        # Ctrl-C reaches the run too; it saves nothing more than its last checkpoint
        if running.poll() is None:
            running.terminate()
            running.wait()
    if running.returncode:
        lines = said.strip().splitlines() or [f"it ended with {running.returncode}"]
        raise RecipeError(lines[-1].removeprefix("luthier: "))


def logged(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines[-2:]):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue  # the line that is being written
    return 0
