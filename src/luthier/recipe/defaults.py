"""What a recipe that names no learning rate and no number of epochs gets.

The learning rate is declared by the methods: a tuner has one for AdamW on supervised rows, and an objective,
an optimizer or a transform may multiply it. Epochs depend on the rows: few rows are read several times, many
once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe.aliases import NAMES
from luthier.recipe.read import name_of
from luthier.registry import Card, card

RATE = 2e-4  # of tuners that declare none
ROWS = 3000  # rows that a run reads at least, repeated ones counted, unless that takes more than MOST epochs
MOST = 10  # epochs
AUTO = "auto"

TERM = r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?([A-Za-z]\w*)\s*"


@dataclass(frozen=True)
class DefaultRate:
    """A learning rate, and which methods it is made of."""

    value: float
    parts: tuple[str, ...]  # as "tuner 'lora' 0.0002"

    @property
    def reason(self) -> str:
        """'tuner lora 0.0002 x objective dpo 0.05'."""
        return " x ".join(self.parts)


def default_rate(tuner: Any, objective: Any, optim: Any) -> DefaultRate:
    """The learning rate of a recipe with these values of `tuner`, `objective` and `optim` that names none.

    Of a sum of objectives the one with the largest weight counts. Methods that do not exist count as none:
    they are refused where they are built.
    """
    base = _card("tuner", _name(tuner, "tuner"))
    value = RATE
    if base is not None and base.default_rate is not None:
        value = base.default_rate
    parts = [f"tuner {base.name if base else _name(tuner, 'tuner')} {value:g}"]
    factors = [("objective", _main_objective(objective))]
    if isinstance(optim, (list, tuple)):
        factors += [("transform", _name(each, "optim")) for each in optim]
    else:
        factors.append(("optimizer", _name(optim, "optim")))
    for kind, name in factors:
        declared = _card(kind, name)
        if declared is not None and declared.rate_factor != 1:
            value *= declared.rate_factor
            parts.append(f"{kind} {name} {declared.rate_factor:g}")
    return DefaultRate(float(f"{value:.6g}"), tuple(parts))


def default_epochs(rows: int) -> int:
    """Passes over so many rows: as many as it takes to read ROWS of them, at least 1, at most MOST."""
    return max(1, min(MOST, round(ROWS / max(1, rows))))


def _name(value: Any, key: str) -> str:
    """The name of a method, as luthier has it; empty where there is none."""
    name = name_of(value)
    if not isinstance(name, (str, type(None))):
        name = getattr(value, "name", None)
    meaning = NAMES.get(key, {}).get(name or "", name)
    return str(name_of(meaning) or "")


def _card(kind: str, name: str) -> Card | None:
    try:
        return card(kind, name)
    except RecipeError:
        return None


def _main_objective(value: Any) -> str:
    """The name of the objective, or of the term of a sum that has the largest weight."""
    best, heaviest = "", 0.0
    for weight, name in _terms(value):
        if weight > heaviest:
            best, heaviest = name, weight
    return best


def _terms(value: Any) -> Iterator[tuple[float, str]]:
    """(size of its weight, name) of each term of an objective, without building it."""
    if isinstance(value, str):
        for weight, name in re.findall(TERM, value):
            yield abs(float(weight or 1)), name
        return
    for term in value if isinstance(value, (list, tuple)) else [value]:
        weight = 1.0
        if isinstance(term, Mapping):
            weight = term.get("weight", 1.0)
        if isinstance(weight, (int, float)):
            yield abs(weight), _name(term, "objective")
