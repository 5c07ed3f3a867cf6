"""Rows as a model's tokenizer reads them, beside what they can be used for."""

from __future__ import annotations

from typing import Any

from luthier.data.load import load_rows
from luthier.data.profile import profile_rows
from luthier.data.quarantine import count_reasons
from luthier.recipe.model_names import model_config, resolve_model
from luthier.text.encode import BATCH, Renderer, is_text
from luthier.text.encoded import Encoded

MAX_LENGTH = 2048  # tokens of a row, where nothing else says how many
PERCENTILES = (50, 90, 99, 100)
MARKS = ("⟦", "⟧")  # before and after what is trained on


def preview(
    source: Any,
    model: str = "toy:lm",
    chat_template: str | None = None,
    examples: int = 3,
    marks: tuple[str, str] = MARKS,
    max_length: int | None = None,
) -> dict[str, Any]:
    """A source of rows, as in a recipe's `data`: what `data.profile.profile_rows` says of it, and {shown: the
    first rows as text, tokens, share: of them supervised, longest, unreadable: [{reason, rows, first}],
    lengths: {part: {50: tokens, 90: ..., 99: ..., 100: ...}}, max_length, and of the rows that are longer
    cut: how many lose their end, pieces: how many are plain texts, cut into pieces, full: how many have no
    room for a completion}. Nothing is cut here.

    model: whose tokenizer reads the rows. marks: around supervised text in `shown`. max_length: tokens of a
    row; default: what the model can read, up to 2048.
    """
    loaded = load_rows(source, max_bad_rows=1.0)
    profile = profile_rows(loaded)
    answered = [row for row in loaded.rows if row.get("completions")]
    if max_length is None:
        positions = getattr(model_config(model).get_text_config(), "max_position_embeddings", None)
        max_length = min(MAX_LENGTH, positions or MAX_LENGTH)
    profile |= {"shown": [], "tokens": 0, "share": 0.0, "longest": 0, "unreadable": [], "lengths": {}}
    profile |= {"max_length": max_length, "cut": 0, "pieces": 0, "full": 0}
    if not answered:
        return profile

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    renderer = Renderer(tokenizer, chat_template=chat_template)
    rows, bad, stats = renderer.encode_all(answered)
    return {
        **profile,
        "shown": [renderer.decode_marked(row, marks) for row in rows[:examples]],
        "tokens": stats["tokens"],
        "share": stats["supervised_share"],
        "longest": stats["longest"],
        "unreadable": count_reasons(bad),
        "notes": [*profile["notes"], *renderer.warnings],
        **lengths_of(renderer, rows, max_length),
    }


def lengths_of(renderer: Renderer, rows: list[dict], max_length: int) -> dict[str, Any]:
    """{lengths: percentiles of the tokens of rows, of their prompts and of their completions, cut, pieces,
    full: rows that are longer than max_length}.
    """
    tokens: dict[str, list[int]] = {"row": [], "prompt": [], "completion": []}
    longer = {"cut": 0, "pieces": 0, "full": 0}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for row, encoded in zip(batch, renderer.encode_batch(batch), strict=True):
            if not isinstance(encoded, Encoded):
                continue
            tokens["row"].append(len(encoded))
            tokens["prompt"].append(len(encoded.prompt))
            tokens["completion"] += map(len, encoded.completions)
            if len(encoded.prompt) >= max_length:
                longer["full"] += 1
            elif max(len(encoded.prompt) + len(c) for c in encoded.completions) > max_length:
                longer["pieces" if is_text(row) else "cut"] += 1
    percentiles = {}
    for part, counts in tokens.items():
        counts.sort()
        if counts:
            percentiles[part] = {str(p): counts[(len(counts) - 1) * p // 100] for p in PERCENTILES}
    return {"lengths": percentiles, **longer}
