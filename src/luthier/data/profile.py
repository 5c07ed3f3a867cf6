"""What a file of rows can feed: how it is read, what cannot be used, and which objectives it is enough for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import Any

from luthier.data.load import load_rows
from luthier.data.quarantine import count_reasons
from luthier.recipe.capabilities import columns_of, sentence
from luthier.registry import build, cards, requires_of

ROLES = ("reference", "teacher", "critic")


def survey(
    source: Any, model: str = "toy:lm", chat_template: str | None = None, shown: int = 3
) -> dict[str, Any]:
    """A source of rows, as in a recipe's `data`.

    {format, rows, columns, bad: [{reason, rows, first}], feeds: [{objective, feeds, why}], shown: [text],
    tokens, share, ...}. `feeds` is "yes", "through a stage" or "no". model: whose tokenizer shows the first
    rows, what is learned between marks.
    """
    loaded = load_rows(source, max_bad_rows=1.0)
    found: dict[str, Any] = {
        "format": loaded.format,
        "total": loaded.total,
        "rows": len(loaded.rows),
        "columns": dict(Counter(k for row in loaded.rows for k in row if k != "id").most_common()),
        "bad": count_reasons(loaded.bad),
    }
    some = loaded.rows[:100]
    found["feeds"] = feeds(columns_of(some))
    return found | rendered(loaded.rows, model, chat_template, shown)


def feeds(have: Set[str]) -> list[dict[str, str]]:
    """Every objective, and whether rows with these words are enough for it on a causal model."""
    stages = [build_or_none(c.name) for c in cards("stage")]
    out = []
    for c in cards("objective"):
        wanted = requires_of(build("objective", c.name))
        missing = sorted(w for w in wanted - have if getattr(w, "of_rows", True))
        through = {
            w: [s.name for s in stages if s and w in s.provides and of_rows(requires_of(s)) <= have]
            for w in missing
        }
        if not missing:
            roles = [w for w in ROLES if w in wanted]
            out.append(
                {
                    "objective": c.name,
                    "feeds": "yes",
                    "why": f"with roles: {', '.join(roles)}" if roles else "",
                }
            )
        elif all(through.values()):
            given = ", ".join(f"{s[0]} gives {w}" for w, s in through.items())
            out.append({"objective": c.name, "feeds": "through a stage", "why": given})
        else:
            lacking = [sentence(w) + made_of(w, stages, have) for w in missing if not through[w]]
            out.append({"objective": c.name, "feeds": "no", "why": f"wants {'; '.join(lacking)}"})
    return sorted(out, key=lambda o: ("yes", "through a stage", "no").index(o["feeds"]))


def of_rows(words: Set[str]) -> set[str]:
    """Of capabilities and columns those that rows bring."""
    return {w for w in words if getattr(w, "of_rows", True)}


def made_of(word: str, stages: list, have: Set[str]) -> str:
    """Which stage would give it, and of what."""
    for stage in stages:
        if stage and word in stage.provides:
            return (
                f" (stage {stage.name} makes it of {', '.join(sorted(of_rows(requires_of(stage)) - have))})"
            )
    return ""


def build_or_none(name: str) -> Any:
    """A stage with its defaults; None where it has a setting without one."""
    from dataclasses import MISSING, fields

    from luthier.registry import find

    required = any(f.default is MISSING and f.default_factory is MISSING for f in fields(find("stage", name)))
    return None if required else build("stage", name)


def rendered(rows: list[dict], model: str, chat_template: str | None, shown: int) -> dict[str, Any]:
    """The first rows as the model's tokenizer reads them, and how many of all rows it can use."""
    from transformers import AutoTokenizer

    from luthier.recipe.model_names import resolve_model
    from luthier.report.text import MARKS
    from luthier.text.encode import Renderer

    asked = [row for row in rows if row.get("completions")]
    if not asked:
        return {"shown": [], "tokens": 0, "share": 0.0, "unreadable": []}
    renderer = Renderer(AutoTokenizer.from_pretrained(resolve_model(model)), chat_template=chat_template)
    kept, bad, stats = renderer.encode_all(asked)
    return {
        "shown": [renderer.decode_marked(row, MARKS) for row in kept[:shown]],
        "tokens": stats["tokens"],
        "share": stats["supervised_share"],
        "longest": stats["longest"],
        "unreadable": count_reasons(bad),
    }
