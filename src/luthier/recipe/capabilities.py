"""What the methods of a recipe require of each other and of the rows, and the sentence where it is not
there.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from luthier.errors import RecipeError
from luthier.registry import Capability, cards, requires_of


def requirements(method: Any) -> frozenset[str]:
    """What a method, or a sum of objectives, requires."""
    return requires_of(method) if hasattr(method, "kind") else method.requires


def columns_of(rows: Sequence[dict]) -> set[str]:
    """What every one of these rows provides: its columns, `pairs` where completions differ in score."""
    if not rows:
        return set()
    columns = set.intersection(*(set(row) for row in rows))
    if not all(row.get("completions") for row in rows):
        columns.discard("completions")
    if all(is_pair(row) for row in rows):
        columns.add("pairs")
    return columns


def is_pair(row: dict) -> bool:
    """Whether a row has completions of different score."""
    return len(row.get("completions", ())) > 1 and len(set(row.get("scores", ()))) > 1


def require(method: Any, available: Set[str], label: str, parts: Sequence[Any] = ()) -> None:
    """Refuse a method that requires what nothing in the recipe provides. label: what it is called. parts: the
    methods of which a recipe has one each (architecture, tuner, ...).

    Raises RecipeError, which names the part that would have to be another one, and what provides it.
    """
    for word in sorted(requirements(method) - available):
        kinds = {card.kind for card in cards() if word in card.provides}
        others = " and ".join(f"{part.kind} '{part.name}'" for part in parts if part.kind in kinds)
        others = f" ({others} does not)" if others else ""
        raise RecipeError(
            f"{label} requires {sentence(word)}, and nothing in this recipe provides"
            f" it{others}{help_with(word)}"
        )


def sentence(word: str) -> str:
    """A capability or column as it reads behind "requires"."""
    return getattr(word, "says", "") or f"rows with a column `{word}`"


def help_with(word: str) -> str:
    """Which methods provide a capability, and what to write in the recipe."""
    providers = [f"{card.kind} '{card.name}'" for card in cards() if word in card.provides]
    out = f"; provided by: {', '.join(providers)}" if providers else ""
    if isinstance(word, Capability) and word.advice:
        out += f"; {word.advice}"
    return out
