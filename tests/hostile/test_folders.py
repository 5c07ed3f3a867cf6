"""Run folders, damaged or foreign: every command answers as before, says so, or refuses in a sentence.

Each input is one file of a run in one way that nobody meant, and one command on it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import luthier
from helpers.hostile import COUNT, SEED, Hang, Tally, hostile_value, limited, place_of
from helpers.rows import recipe_of
from luthier.errors import RecipeError
from luthier.model.loaded import load
from luthier.serve.chat import chat
from luthier.serve.export import export
from luthier.serve.inspect import inspect
from luthier.storage import checkpoints
from luthier.studio.run_store import RunStore

pytestmark = pytest.mark.slow
HUGE = 3 << 30  # bytes that a file seems to have
PLACES = ("nowhere", "/dev/zero", "/proc/1/mem", ".")  # what a link may lead to


@pytest.fixture(scope="module")
def home(shallow, tmp_path_factory):
    """A finished run, and one that was stopped in the middle; both with everything that evaluators leave."""
    home = tmp_path_factory.mktemp("home")
    recipe = recipe_of(shallow) | {
        "tuner": {"name": "lora", "r": 2},
        "max_steps": 4,
        "logging_steps": 1,
        "eval_data": 0.1,
        "evaluate": ["loss", {"name": "generate", "n": 3, "max_new_tokens": 3}],
    }
    luthier.tune(recipe, folder=home / "runs" / "finished")
    luthier.tune(recipe, folder=home / "runs" / "stopped", stop_at=2)
    return recipe, home


def damage(path: Path, chance: random.Random) -> str:
    """Do something to a file. Returns what."""
    content = path.read_bytes()
    kind = chance.choice(KINDS)
    path.unlink()
    if kind == "truncated":
        path.write_bytes(content[: chance.randrange(len(content) + 1)])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "binary":
        path.write_bytes(chance.randbytes(chance.choice((1, 100, 5000))))
    elif kind == "another type":
        path.write_text(json.dumps(plain(hostile_value(chance))), encoding="utf-8")
    elif kind == "another value":
        path.write_bytes(with_another_value(content, chance))
    elif kind == "a bit":
        content = bytearray(content or b"x")
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind == "huge":
        path.write_bytes(content)
        os.truncate(path, HUGE)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link":
        path.symlink_to(chance.choice((*PLACES, path.name)))
    return kind


KINDS = (
    *("truncated", "empty", "binary", "missing", "another type", "another value", "another value", "a bit"),
    *("a bit", "huge", "a folder", "a pipe", "a link"),
)


def plain(value):
    """A hostile value as JSON has it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)[:100]
    return value


def with_another_value(content: bytes, chance: random.Random) -> bytes:
    """JSON with one value that nobody meant; other files with a line of it."""
    lines = content.split(b"\n")
    place = chance.randrange(len(lines))
    for text, whole in ((content, True), (lines[place], False)):
        try:
            value = json.loads(text)
            value[chance.choice(list(value))] = plain(hostile_value(chance))
        except (ValueError, TypeError, IndexError, KeyError):
            continue
        changed = json.dumps(value).encode()
        if whole:
            return changed
        lines[place] = changed
        break
    else:
        lines[place] = json.dumps(plain(hostile_value(chance))).encode()
    return b"\n".join(lines)


def look(recipe: dict, run: Path) -> None:
    """All that the studio shows of a folder, beside one that is as it should be."""
    store = RunStore(run.parent.parent)
    assert {summary["name"] for summary in store.runs()} >= {"beside"}
    for summary in store.runs():
        described = store.describe(summary["name"])
        json.dumps(described, default=str)
        store.metrics(summary["name"], 0, "")
        store.command(summary["name"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).roles.tuner.state()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


COMMANDS: dict[str, Callable[[dict, Path], object]] = {
    "tune": lambda recipe, run: luthier.tune(recipe, folder=run),
    "chat": lambda recipe, run: chat(str(run), "1+1=", say=str, max_new_tokens=1),
    "load": lambda recipe, run: load(run),
    "report": lambda recipe, run: luthier.Report.read(run),
    "inspect": lambda recipe, run: inspect(recipe["model"], run, recipe["data"][:4]),
    "export": lambda recipe, run: export(run, "lora", run.parent.parent / "export"),
    "studio": look,
}


def test_damaged_folders(home, tmp_path):
    recipe, source = home
    chance = random.Random(SEED)
    tally = Tally("run folders")
    expected = {name: tensors(source / "runs" / name) for name in ("finished", "stopped")}
    whole = luthier.Report.read(source / "runs" / "finished")
    fingerprint = load(source / "runs" / "finished").recipe.fingerprint()
    noted = {name: len(load(source / "runs" / name).notes) for name in expected}
    for i in range(max(1, COUNT // 10)):
        name, command = chance.choice(("finished", "finished", "stopped")), chance.choice([*COMMANDS])
        place = tmp_path / str(i)
        run = Path(shutil.copytree(source / "runs" / name, place / "runs" / "r"))
        (place / "runs" / "beside").mkdir()
        (place / "runs" / "beside" / "run.json").write_text("{}")
        paths = sorted(path for path in run.rglob("*") if path.is_file())
        path = chance.choice(paths)
        label = f"{i} {command} of a {name} run, {path.relative_to(run)}: {damage(path, chance)}"
        try:
            with limited(30, waiting=300):
                outcome = COMMANDS[command](recipe, run)
                if (
                    command == "load"
                    and len(outcome.notes) == noted[name]
                    and not (
                        same(outcome.roles.tuner.state(), expected[name])
                        and outcome.recipe.fingerprint() == fingerprint
                    )
                ):
                    tally.add("silently different", label)
                if command == "tune":
                    if (outcome.losses, outcome.after) != (whole.losses, whole.after) and not any(
                        "damaged" in note for note in outcome.notes
                    ):
                        tally.add("silently different", f"{label}: {outcome.notes}")
                    newest = checkpoints.paths(run)[-1]
                    if not same(checkpoints.load(newest).tensors, end_of(source)):
                        tally.add("silently different", f"{label}: tensors")
                tally.add("answered")
        except RecipeError as error:
            if command == "studio":
                tally.add("tracebacks", f"{label}: the list ended over one folder: {error}")
            assert str(error).strip() and "Traceback" not in str(error), label
            tally.add("refused")
        except Hang:
            tally.add("hangs", label + "\n" + "\n".join(traceback.format_exc().strip().splitlines()[-8:]))
        except Exception as error:
            tally.add(
                "tracebacks", f"{label}: {type(error).__name__}: {str(error)[:150]} at {place_of(error)}"
            )
        shutil.rmtree(place)
    tally.close()


def end_of(source: Path) -> dict[str, torch.Tensor]:
    """What training ends with."""
    return checkpoints.load(checkpoints.paths(source / "runs" / "finished")[-1]).tensors
