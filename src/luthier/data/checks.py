"""What is probably not meant in rows that can be read: a run warns of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.data.load import Data

LISTED = 12  # columns that a warning lists
SAMPLE = 100  # rows that are looked at
PROMPT_END = re.compile(r"""[A-Za-z0-9.!?"']\Z""")
COMPLETION_START = re.compile(r"[^\s.,;:!?)]")
# columns of text that need no mention
EXPECTED = {"id", "prompt", "answer", "label", "kind", "item", "skill", "task"}


def glued_words(rows: Sequence[dict]) -> list[str]:
    """Places where a prompt's last word and a completion's first run together: "...said Annaworld"."""
    places = []
    for row in rows:
        prompt = row["prompt"]
        for completion in row.get("completions", ())[:1]:
            if not isinstance(prompt, str) or not isinstance(completion, str):
                continue
            if PROMPT_END.search(prompt) and COMPLETION_START.match(completion):
                places.append(f"…{prompt[-20:]}{completion[:20]}…")
    return places


def unused_columns(data: Data) -> str | None:
    """A sentence about columns of text that are kept but not trained on: what a user meant may be one of
    them.
    """
    columns: dict[str, None] = {}
    for row in data.rows[:SAMPLE]:
        for name, value in row.items():
            if isinstance(value, str) and name not in EXPECTED:
                columns[name] = None
    if not columns or " + " in data.format:
        return None
    listed = ", ".join([*columns][:LISTED])
    return f"rows are read as format '{data.format}'; these columns are not trained on: {listed}"
