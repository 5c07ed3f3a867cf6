"""A file of another tool as a recipe, with what became of each key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe, plain
from luthier.recipe.validate import validate
from luthier.registry import did_you_mean
from luthier.tools.foreign import axolotl, llama_factory, ms_swift, trl
from luthier.tools.foreign.draft import Draft, Note, follow
from luthier.tools.foreign.read import Written, read_configuration

# in this order where a file fits several equally well
TOOLS: dict[str, ModuleType] = {
    "trl": trl,
    "llama_factory": llama_factory,
    "axolotl": axolotl,
    "ms_swift": ms_swift,
}
# a row that every objective of these tools can read: pairs, scores, an answer to check, steps
ROW = {
    "id": "0",
    "prompt": "1 + 1 =",
    "completions": ["2", "3"],
    "scores": [1.0, 0.0],
    "answer": "2",
    "steps": ["1 + 1", "2"],
    "step_labels": [1, 1],
}


@dataclass(frozen=True)
class Imported:
    """A recipe of another tool's configuration."""

    tool: str
    recipe: dict[str, Any]
    notes: tuple[Note, ...]  # what became of each key, in the order of the outcomes

    def of(self, outcome: str) -> list[Note]:
        """The keys with this outcome."""
        return [note for note in self.notes if note.outcome == outcome]

    def yaml(self) -> str:
        """The recipe's text, with a comment for each key that was changed, dropped or not known."""
        lines = [f"# From a configuration of {self.tool}."]
        for outcome in ("changed", "dropped", "unknown"):
            for note in self.of(outcome):
                lines.append("# " + sentence(note))
        text = yaml.safe_dump(plain(self.recipe), sort_keys=False, allow_unicode=True, width=110)
        return "\n".join(lines) + "\n" + text


def sentence(note: Note) -> str:
    """What became of a key, for people."""
    if note.outcome == "unknown":
        return f"unknown: {note.key}{note.why}"
    if note.outcome == "changed":
        return f"changed: {note.key} -> {note.place}: {note.why}"
    if note.outcome == "dropped":
        return f"dropped: {note.key}: {note.why}"
    return f"{note.key} -> {note.place}"


def import_file(path: Path, tool: str | None = None, devices: int | None = None) -> Imported:
    """Read another tool's file as a recipe.

    Args:
        path: YAML, JSON, or a shell script with the tool's command.
        tool: a key of TOOLS; recognised by the file's keys where there is none.
        devices: processes that the file was written for; the effective batch size counts all of them.

    Raises:
        RecipeError: the file is of none of the tools, or says what no recipe can.
    """
    if not path.is_file():
        raise RecipeError(f"{path} does not exist")
    written = read_configuration(path)
    name = tool or written.tool or recognise(written.values, path)
    if name not in TOOLS:
        raise RecipeError(f"no tool is named '{name}'{did_you_mean(name, TOOLS)}; known: {', '.join(TOOLS)}")
    if not written.command:  # the name of a file such as dpo.yaml says what it is for
        written = replace(written, command=path.stem)
    imported = convert(written, TOOLS[name], devices)
    check(imported)
    return imported


def recognise(values: Mapping[str, Any], path: Path) -> str:
    """The tool whose table has most of the keys."""
    hits = {}
    for name, module in TOOLS.items():
        signs = sum(3 for key in values if key in module.SIGNS)
        hits[name] = signs + sum(key in module.KEYS for key in values)
    best = max(hits, key=lambda name: hits[name])
    if hits[best] < 2:
        raise RecipeError(f"{path} looks like no configuration of {', '.join(TOOLS)}; say which with --tool")
    return best


def convert(written: Written, module: ModuleType, devices: int | None = None) -> Imported:
    """Follow a tool's table. Keys that it does not have are all told at once."""
    values = {key: value for key, value in written.values.items() if value is not None}
    draft = Draft(module.NAME, values, module.DEFAULTS, devices or written.devices)
    prepare: Callable[[Draft, str], None] | None = getattr(module, "prepare", None)
    if prepare is not None:
        prepare(draft, written.command)
    module.refuse(draft)
    follow(module.KEYS, draft)
    for key in draft.values:
        if key not in module.KEYS:
            draft.note(key, "unknown", why=did_you_mean(key, module.KEYS))
    return Imported(module.NAME, draft.recipe, tuple(draft.notes))


def check(imported: Imported) -> Recipe:
    """Refuse what would not train, as far as that can be seen without the model and the rows.

    Raises RecipeError.
    """
    recipe = Recipe.load(imported.recipe)
    changes: dict[str, Any] = {"model": "toy:lm", "data": None, "eval_data": "auto", "init_from": None}
    validate(recipe.but(**changes), [ROW])
    return recipe
