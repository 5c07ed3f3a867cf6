"""What a run leaves for people: a page, a card, a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# around what is learned, in rows shown to people: private characters, so no text has them
MARKS = ("\ue000", "\ue001")
SHOWN = 3  # rows that are shown


def rendered(roles: Any, rows: Sequence[dict]) -> list[str]:
    """The first rows as the model reads them, what is learned between MARKS."""
    return [roles.renderer.decode_marked(row, MARKS) for row in rows[:SHOWN]]


def write_report(recipe: Any, report: Any, logged: Sequence[dict], folder: Path) -> None:
    """report.html and README.md in a run folder. logged: the lines of metrics.jsonl."""
    from luthier.report.card import card
    from luthier.report.page import page
    from luthier.storage import files

    files.write_text(folder / "report.html", page(recipe, report, logged, folder))
    files.write_text(folder / "README.md", card(recipe, report, folder))
