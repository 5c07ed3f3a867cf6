"""The rows of a run: read, split into those that are learned and those that are held out, looked at for silly
things.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.data import rows as reading
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe


@dataclass
class Data:
    """Rows of a run, before and beside training."""

    rows: list[dict]
    held_out: list[dict]
    bad: list[dict]
    mark: str  # what these rows are; a resumed run must find the same
    shape: str = ""  # the format they were read as


def load_data(recipe: Recipe, quarantine: Path | None = None) -> Data:
    """The recipe's rows in canonical form, split, with the bad ones apart (and written to `quarantine`)."""
    if recipe.data is None:
        raise RecipeError("a recipe needs `data`: a file, a folder, a hub name, rows, or toy:TASK")
    loaded = reading.load(recipe.data, max_bad_rows=recipe.max_bad_rows, quarantine=quarantine)
    rows, bad, held = loaded.rows, loaded.bad, []
    if isinstance(recipe.eval_data, (int, float)) and not isinstance(recipe.eval_data, bool):
        if not 0 <= recipe.eval_data < 1:
            raise RecipeError(f"eval_data: {recipe.eval_data} is not a share below 1 (nor a file)")
        if recipe.eval_data and len(rows) * recipe.eval_data >= 4:
            # whatever the seed: runs with other seeds are measured on the same rows
            rows, held = reading.split(rows, recipe.eval_data)
    elif recipe.eval_data:
        other = reading.load(recipe.eval_data, max_bad_rows=recipe.max_bad_rows, quarantine=quarantine)
        held, bad = other.rows, [*bad, *other.bad]
    mark = hashlib.sha256(json.dumps([rows, held], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Data(rows, held, bad, mark, loaded.format)


def touching(rows: Sequence[dict]) -> list[str]:
    """Where a prompt's last word and the completion's first run into each other: "...said Annaworld"."""
    plain = (
        (r["prompt"], c)
        for r in rows
        for c in r.get("completions", ())[:1]
        if isinstance(r["prompt"], str) and isinstance(c, str)
    )
    ends, goes_on = re.compile(r"""[A-Za-z0-9.!?"']\Z"""), re.compile(r"[^\s.,;:!?)]")
    return [f"…{p[-20:]}{c[:20]}…" for p, c in plain if ends.search(p) and goes_on.match(c)]


# columns of text that are no news beside a row
READ = {"id", "prompt", "answer", "label", "kind", "item", "skill", "world"}


def beside(data: Data) -> str | None:
    """The columns of text that are kept but not learned from, in a sentence: what a user meant may be one of
    them.
    """
    seen = {
        k: None for row in data.rows[:100] for k, v in row.items() if isinstance(v, str) and k not in READ
    }
    if not seen or " + " in data.shape:
        return None
    return (
        f"rows are read as '{data.shape}'; what else they hold is kept and not learned from:"
        f" {', '.join([*seen][:12])}"
    )


def sample_rows(recipe: Recipe) -> list[dict]:
    """The first hundred rows of a recipe, to validate it with; none where it names no data."""
    return load_data(recipe).rows[:100] if recipe.data is not None else []
