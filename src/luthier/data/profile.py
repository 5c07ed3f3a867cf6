"""What a file of rows can be used for: how it is read, what is rejected, which objectives it is enough
for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from typing import Any

from luthier.data.load import LoadedRows
from luthier.data.quarantine import count_reasons
from luthier.recipe.capabilities import columns_of, sentence
from luthier.registry import Card, cards, find

ROLES = ("reference", "teacher", "critic")
# columns of rows in luthier's shape that are learned from, or say how
LEARNED = frozenset(
    "prompt completions scores tools prefix label texts labels steps step_labels token_weights answer"
    " chat_template_kwargs".split()
)
REPLIES = ("answer", "answers", "solution", "reference", "gold", "target")
SAMPLE = 100  # rows whose columns decide what they are enough for
ANSWERS = ("yes", "with a stage", "no")


def profile_rows(loaded: LoadedRows) -> dict[str, Any]:
    """Loaded rows in figures: {format, total, rows, rejected, columns: {name: rows that have it}, bad:
    [{reason, rows, first}], feeds: as `objectives_for`, reading: what the columns say, objective: {name,
    needs} to begin with, repeated: rows that are there before, prompts: with several answers, unlearned:
    columns that are not learned from, notes: of where the rows come from}.
    """
    kind = find("format", loaded.format.split(" + ")[0])
    feeds = objectives_for(columns_of(loaded.rows[:SAMPLE]))
    repeated, prompts = count_repetitions(loaded.rows)
    needs = kind.advice
    for answer in feeds:
        if answer["objective"] == kind.objective and answer["feeds"] == "yes":
            needs = "; ".join(filter(None, (answer["why"], kind.advice)))
    counts: Counter[str] = Counter()
    for row in loaded.rows:
        counts.update(list(row))
    del counts["id"]
    return {
        "format": loaded.format,
        "total": loaded.total,
        "rows": len(loaded.rows),
        "rejected": len(loaded.bad),
        "columns": dict(counts.most_common()),
        "bad": count_reasons(loaded.bad),
        "feeds": feeds,
        "reading": kind.reading,
        "objective": {"name": kind.objective, "needs": needs},
        "repeated": repeated,
        "prompts": prompts,
        "unlearned": unlearned_columns(counts),
        "notes": [*loaded.notes, *other_readings(loaded, kind)],
    }


def other_readings(loaded: LoadedRows, kind: type) -> list[str]:
    """What rows could be read as besides, where a column that is not learned from looks like a reply or a
    class.
    """
    rows = loaded.rows[:SAMPLE]
    notes = []
    if kind.name == "prompt":
        for name in REPLIES:
            if rows and all(isinstance(row.get(name), (str, int, float)) for row in rows):
                notes.append(f"to learn `{name}` as the reply to `prompt`: columns: {{completion: {name}}}")
    elif kind.name == "text":
        for name in rows[0] if rows else ():
            if name not in LEARNED | {"id"} and looks_like_classes([row.get(name) for row in rows]):
                notes.append(f"to learn `{name}` as the class of `text`: columns: {{label: {name}}}")
    return notes


def looks_like_classes(values: Sequence[Any]) -> bool:
    """Whether a column holds few short values, each several times."""
    if not all(isinstance(value, (str, int)) and len(str(value)) <= 40 for value in values):
        return False
    return len(values) >= 8 and 2 <= len(set(values)) <= len(values) // 4


def count_repetitions(rows: Sequence[dict]) -> tuple[int, int]:
    """(rows whose content an earlier row has too, prompts that several rows answer differently)."""
    answers: dict[bytes, set[bytes]] = {}
    repeated = 0
    for row in rows:
        prompt = digest(row.get("prompt"))
        answer = digest([row.get(name) for name in ("completions", "scores", "prefix", "tools", "answer")])
        others = answers.setdefault(prompt, set())
        repeated += answer in others
        others.add(answer)
    empty = digest("")
    several = sum(len(others) > 1 for prompt, others in answers.items() if prompt != empty)
    return repeated, several


def digest(value: Any) -> bytes:
    """What tells a value from others."""
    content = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(content.encode(), digest_size=12).digest()


def unlearned_columns(columns: Iterable[str]) -> list[str]:
    """Columns that no format reads: rewards and stages may read them, but nothing is learned from them."""
    return [name for name in columns if name not in LEARNED]


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
