"""Rows as a model's tokenizer reads them, beside what they can be used for."""

from __future__ import annotations

from typing import Any

from luthier.data.load import load_rows
from luthier.data.profile import profile_rows
from luthier.data.quarantine import count_reasons
from luthier.recipe.model_names import resolve_model
from luthier.text.encode import Renderer

MARKS = ("⟦", "⟧")  # before and after what is trained on


def preview(
    source: Any,
    model: str = "toy:lm",
    chat_template: str | None = None,
    examples: int = 3,
    marks: tuple[str, str] = MARKS,
) -> dict[str, Any]:
    """A source of rows, as in a recipe's `data`: what `data.profile.profile_rows` says of it, and {shown: the
    first rows as text, tokens, share: of them supervised, longest, unreadable: [{reason, rows, first}]}.

    model: whose tokenizer reads the rows. marks: around supervised text in `shown`.
    """
    loaded = load_rows(source, max_bad_rows=1.0)
    profile = profile_rows(loaded)
    answered = [row for row in loaded.rows if row.get("completions")]
    if not answered:
        return {**profile, "shown": [], "tokens": 0, "share": 0.0, "longest": 0, "unreadable": []}

    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(resolve_model(model)), chat_template=chat_template)
    rows, bad, stats = renderer.encode_all(answered)
    return {
        **profile,
        "shown": [renderer.decode_marked(row, marks) for row in rows[:examples]],
        "tokens": stats["tokens"],
        "share": stats["supervised_share"],
        "longest": stats["longest"],
        "unreadable": count_reasons(bad),
    }
