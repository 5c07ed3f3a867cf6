"""Published pipelines at toy scale, on rows of a test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import luthier
from luthier.recipe.published import find_published, merge, place
from luthier.recipe.recipe import Recipe


def tune_toy(name: str, path: Path, rows: dict[str, Any] | None = None, changes: dict | None = None):
    """The pipeline at toy scale, nothing measured; rows: instead of the toy rows of these names."""
    pipeline = find_published(name)
    kinds = {kind: value.toy for kind, value in pipeline.rows.items()} | (rows or {})
    recipe = merge(place(pipeline.recipe, kinds), pipeline.toy)
    recipe = merge({"evaluate": [], **recipe}, changes or {})
    return luthier.tune(Recipe.load(recipe), folder=path)


def logged(folder: str | Path, name: str) -> list[float]:
    """A number of every step that logged it."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]
