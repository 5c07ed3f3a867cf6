"""What a file of rows can be used for: how it is read, what is rejected, which objectives it is enough
for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from typing import Any

from luthier.data.load import LoadedRows
from luthier.data.quarantine import count_reasons
from luthier.recipe.capabilities import columns_of, sentence
from luthier.registry import Card, cards

ROLES = ("reference", "teacher", "critic")
SAMPLE = 100  # rows whose columns decide what they are enough for
ANSWERS = ("yes", "with a stage", "no")


def profile_rows(loaded: LoadedRows) -> dict[str, Any]:
    """Loaded rows in figures: {format, total, rows, rejected, columns: {name: rows that have it}, bad:
    [{reason, rows, first}], feeds: as `objectives_for`}.
    """
    counts = Counter(name for row in loaded.rows for name in row if name != "id")
    return {
        "format": loaded.format,
        "total": loaded.total,
        "rows": len(loaded.rows),
        "rejected": len(loaded.bad),
        "columns": dict(counts.most_common()),
        "bad": count_reasons(loaded.bad),
        "feeds": objectives_for(columns_of(loaded.rows[:SAMPLE])),
    }


def objectives_for(columns: Set[str]) -> list[dict[str, str]]:
    """Every objective, and whether rows with these columns are enough for it: {objective, feeds, why}.

    `feeds` is "yes", "through a stage" (which makes the missing columns of those there are) or "no". Read
    from declarations alone, as methods have them under their defaults: no method is imported.
    """
    stages = cards("stage")
    answers = []
    for objective in cards("objective"):
        missing = sorted(columns_among(objective.requires) - columns)
        unmade = [column for column in missing if not makers(column, stages, columns)]
        if unmade:
            reasons = [sentence(column) + how_to_make(column, stages, columns) for column in unmade]
            answer = {"feeds": "no", "why": f"requires {'; '.join(reasons)}"}
        elif missing:
            advice = dict.fromkeys(advice_on(column, makers(column, stages, columns)) for column in missing)
            answer = {"feeds": "with a stage", "why": "; ".join(advice)}
        else:
            answer = {"feeds": "yes", "why": ""}
            roles = [role for role in ROLES if role in objective.requires]
            if roles:
                answer["why"] = f"with roles: {', '.join(roles)}"
        answers.append({"objective": objective.name, **answer})
    return sorted(answers, key=lambda answer: ANSWERS.index(answer["feeds"]))


def columns_among(words: Iterable[str]) -> set[str]:
    """Of capabilities and columns those that rows bring."""
    return {word for word in words if getattr(word, "of_rows", True)}


def makers(column: str, stages: Sequence[Card], columns: Set[str]) -> list[str]:
    """The stages that make a column of those that there are."""
    names = []
    for stage in stages:
        if column in stage.provides and columns_among(stage.requires) <= columns:
            names.append(stage.name)
    return names


def advice_on(column: str, stages: Sequence[str]) -> str:
    """How to get a missing column: as its declaration advises, else the stages that make it."""
    advice = getattr(column, "advice", "")
    if advice:
        return f"{column}: {advice}"
    return f"{column}: stage {' or '.join(stages)}"


def how_to_make(column: str, stages: Sequence[Card], columns: Set[str]) -> str:
    """Which stage would make a column, and what that stage still requires."""
    for stage in stages:
        if column in stage.provides:
            required = sorted(columns_among(stage.requires) - columns)
            return f" (stage {stage.name} computes it from {', '.join(required)})"
    return ""
