"""Every file of a run, damaged in every way, before every command: an answer, or a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import luthier
from helpers.rows import recipe_of
from luthier.errors import RecipeError
from luthier.model.loaded import load
from luthier.serve.chat import chat
from luthier.serve.export import export
from luthier.serve.inspect import inspect
from luthier.studio.run_store import RunStore

FILES = ["run.json", "recipe.yaml", "checkpoint-2/state.json", "metrics.jsonl", "report.json", "before.json"]


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGES = {
    "truncated": truncated,
    "empty": lambda content: b"",
    "binary": lambda content: bytes(range(256)) * 4,
    "missing": None,
    "list": lambda content: b"[1, 2]\n",
    "object": lambda content: (
        b'{"step": "x", "stats": 3, "before": [], "base": 1, "losses": {}, "folder": 7}\n'
    ),
    "null": lambda content: b"null\n",
    "deep": lambda content: b"[" * 100_000,
}


@pytest.fixture(scope="module")
def finished(shallow, tmp_path_factory):
    recipe = recipe_of(shallow) | {"tuner": "lora", "max_steps": 2, "evaluate": ["loss"]}
    folder = tmp_path_factory.mktemp("finished") / "run"
    luthier.tune(recipe, folder=folder)
    return recipe, folder


def look(store: RunStore) -> None:
    assert len(store.runs()) <= 1
    for summary in store.runs():
        store.describe(summary["name"])
        store.metrics(summary["name"], 0, "")


COMMANDS = {
    "tune": lambda recipe, home: luthier.tune(recipe, folder=home / "runs" / "r"),
    "chat": lambda recipe, home: chat(str(home / "runs" / "r"), "1+1=", say=str, max_new_tokens=1),
    "load": lambda recipe, home: load(home / "runs" / "r"),
    "report": lambda recipe, home: luthier.Report.read(home / "runs" / "r"),
    "inspect": lambda recipe, home: inspect(recipe["model"], home / "runs" / "r", recipe["data"][:4]),
    "export": lambda recipe, home: export(home / "runs" / "r", "lora", home / "export"),
    "studio": lambda recipe, home: look(RunStore(home)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_damage_is_survived_with_a_sentence(finished, tmp_path, monkeypatch, name, command):
    recipe, source = finished
    # what both models can do elsewhere is measured on hundreds of rows and reads no file of the run
    monkeypatch.setattr("luthier.serve.inspect.EVALUATORS", ("loss", "accuracy"))
    for kind, damage in DAMAGES.items():
        home = tmp_path / kind
        path = Path(shutil.copytree(source, home / "runs" / "r")) / name
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
        try:
            COMMANDS[command](recipe, home)
        except RecipeError as error:
            assert len(str(error)) > 20 and "Traceback" not in str(error), kind
            assert command != "studio", f"{kind}: the list must not end over one folder"
