"""A run's folder: whose it is, whether it is finished, what a new run may not overwrite. What lies in it is
in store.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from luthier import __version__
from luthier.data import rows as reading
from luthier.errors import DiskError, RecipeError, from_code
from luthier.recipe.recipe import Recipe
from luthier.storage import checkpoints, files


@contextmanager
def open_run(folder: Path, recipe: Recipe, mark: str, main: bool, anew: bool) -> Iterator[tuple[bool, str]]:
    """Take a run folder for oneself. Yields whether the run in it is finished and which luthier began it;
    refuses another's.
    """
    if not main:
        yield False, __version__
        return
    with files.exclusive(folder):
        state = folder / "run.json"
        known = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else None
        if known and (known["fingerprint"], known["data"]) != (recipe.fingerprint(), mark):
            # else it was refused before it computed anything
            if not recipe.overwrite and (folder / "before.json").is_file():
                raise RecipeError(
                    f"{folder} holds another run ({_difference(folder, recipe, known, mark)}); give another"
                    " output_dir, or overwrite=true to start anew there"
                )
            known = clear(folder)
        if known and anew and known["finished"]:
            known = clear(folder)
        if known is None:
            known = {
                "fingerprint": recipe.fingerprint(),
                "data": mark,
                "finished": False,
                "version": __version__,
            }
            files.write_text(folder / "recipe.yaml", recipe.yaml())
            files.write_json(state, known)
        (folder / FAILED).unlink(missing_ok=True)
        yield (
            bool(known["finished"] and (folder / "report.json").is_file()),
            known.get("version", "(unknown)"),
        )


def clear(folder: Path) -> None:
    """Leave nothing of a run. run.json goes last: while it stands, a folder that is half cleared is still the
    old run's.
    """
    for path in checkpoints.paths(folder):
        shutil.rmtree(path)
    for pattern in ("logprob_cache-*.bin", "hidden_cache-*.bin", "said-*.bin", "frozen-*.bin"):
        for path in folder.glob(pattern):
            path.unlink()
    for name in (
        "report.json",
        "before.json",
        "rows.jsonl",
        "metrics.jsonl",
        "quarantine.jsonl",
        "forgetting.jsonl",
        "shown.json",
        "samples-before.jsonl",
        "samples-during.jsonl",
        "samples-after.jsonl",
        "by-row-before.json",
        "by-row-during.json",
        "by-row-after.json",
        "calibration-before.json",
        "calibration-after.json",
        "paused.json",
        "report.html",
        FAILED,
        "run.json",
    ):
        (folder / name).unlink(missing_ok=True)


FAILED = "failed.json"  # of a run that failed: which outcome it was, and the sentence


def note_failure(folder: Path, error: Exception) -> None:
    """Leave {code, message} in the folder of a run that failed, for whoever waits for it in another process."""
    outcome = {"code": "crash", "message": f"{type(error).__name__}: {error}"}
    if isinstance(error, RecipeError):
        outcome = {"code": error.code, "message": str(error)}
    with suppress(DiskError):  # a full disk may be what it failed of
        files.write_json(folder / FAILED, outcome)


def read_failure(folder: Path) -> RecipeError | None:
    """What the run in this folder failed of, as its type; None where it did not, or has gone on since."""
    if not (folder / FAILED).is_file():
        return None
    outcome = files.read_json(folder / FAILED)
    return from_code(outcome["code"], outcome["message"])


def note_down(folder: Path, **facts: Any) -> None:
    state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    files.write_json(folder / "run.json", {**state, **facts})


def network_of(folder: Path) -> dict[str, Any]:
    """What the data of a finished run said about its network; class numbers are numbers again."""
    known = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("network", {})
    return (
        known | {"id2label": {int(k): v for k, v in known["id2label"].items()}}
        if "id2label" in known
        else known
    )


def _difference(folder: Path, recipe: Recipe, known: dict, mark: str) -> str:
    was, now = (
        yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
        yaml.safe_load(recipe.yaml()),
    )
    shy = ("data", "eval_data", "output_dir", "overwrite")
    keys = [k for k in now if was.get(k) != now[k] and k not in shy]
    if not keys:
        return "its rows were others" if known["data"] != mark else "made by another version"
    return "it differs in " + ", ".join(
        f"{k}: {str(was.get(k))[:40]} there, {str(now[k])[:40]} here" for k in keys[:2]
    )


def trim(path: Path, step: int) -> None:
    """Lines of steps that a kill has undone leave."""
    if path.is_file():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (json.JSONDecodeError, KeyError):
                break  # the line that was being written when the process died
        files.write_text(path, "".join(f"{line}\n" for line in lines))


def default_folder(recipe: Recipe) -> Path:
    """runs/<model>-<tuner>-<objective>-<fingerprint>: the same recipe finds its run again."""

    def word(x: Any) -> str:
        x = x.get("name", "") if isinstance(x, dict) else x if isinstance(x, str) else "mix"
        return re.sub(r"[^A-Za-z0-9]+", "-", x).strip("-")

    model = word(Path(recipe.model).name if "/" in recipe.model else recipe.model)
    mark = hashlib.sha256(f"{recipe.fingerprint()} {recipe.data} {recipe.eval_data}".encode()).hexdigest()[:6]
    return Path("runs") / "-".join(w for w in (model, word(recipe.tuner), word(recipe.objective), mark) if w)


def on_disk(recipe: Recipe, folder: Path) -> Recipe:
    """Rows given from Python are written beside the run, so that its recipe can be repeated from a shell."""
    for key in ("data", "eval_data"):
        rows = getattr(recipe, key)
        if isinstance(rows, (list, tuple)) and rows and all(reading.looks_like_row(r) for r in rows):
            text = "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in rows)
            path = folder.resolve() / f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
            files.write_text(path, text)
            recipe = replace(recipe, **{key: str(path)})
    return recipe
