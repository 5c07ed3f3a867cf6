"""sq_llava: which tokens of a conversation have labels."""

from __future__ import annotations

import pytest

from helpers.models import make_tokenizer
from helpers.vision import make_idefics, make_llava, picture
from luthier.data.load import load_rows
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build
from luthier.text.encode import Renderer
from luthier.text.images import VisionRenderer, images_of

TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "On a mat."},
]
LEARNED = ["[vusr]What is it?", "A cat.", "[vusr]Where?", "On a mat."]


def learned(renderer, row: dict) -> list[str]:
    """The supervised parts of a row, without marks of turns."""
    text = renderer.decode_marked(row)
    parts = [part.partition("⟧")[0] for part in text.split("⟦")[1:]]
    for mark in ("<|end|>", "<|user|>", "<|assistant|>"):
        parts = [piece for part in parts for piece in part.split(mark) if piece]
    return parts


def stage(ratio: float, rows: list[dict]) -> list[dict]:
    return build("stage", {"name": "sq_llava", "ratio": ratio})(rows, DryRunRoles())


def test_questions_behind_the_mark_are_learned_and_no_others():
    rows = load_rows([{"messages": TURNS} for _ in range(40)]).rows
    renderer = Renderer(make_tokenizer())
    assert stage(0.0, rows) == rows, "without questions nothing changes"
    assert learned(renderer, rows[0]) == ["A cat.", "On a mat."]
    assert all(learned(renderer, row) == LEARNED for row in stage(1.0, rows))
    some = [len(learned(renderer, row)) for row in stage(0.5, rows)]
    assert 10 < some.count(4) < 30 and set(some) == {2, 4}
    assert stage(0.5, rows) == stage(0.5, rows)
    others = [{"id": "t", "prompt": "x", "completions": ["y"]}]
    assert stage(1.0, others) == others


@pytest.mark.parametrize("make", [make_llava, make_idefics])
def test_an_image_before_a_question_is_not(make, tmp_path):
    pytest.importorskip("PIL")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    raw = [{"messages": [{"role": "user", "content": content}, *TURNS[1:]], "images": [picture(0)]}]
    rows = load_rows(raw).rows
    path = make(tmp_path)
    renderer = VisionRenderer(images_of(path).processor.tokenizer, images_of(path))
    assert learned(renderer, stage(1.0, rows)[0]) == LEARNED
    assert learned(renderer, rows[0]) == ["A cat.", "On a mat."]
