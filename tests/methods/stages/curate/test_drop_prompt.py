"""drop_prompt: response only shows no question."""

from __future__ import annotations

from helpers.models import make_tokenizer
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build
from luthier.text.encode import Renderer


def test_response_only_shows_no_question():
    renderer = Renderer(make_tokenizer())
    text = {"id": "a", "prompt": "what is 2+2?", "completions": ["4"]}
    turns = {
        "id": "b",
        "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "2+2?"}],
        "completions": ["4"],
    }
    one, two = build("stage", "response_only")([text, turns], DryRunRoles())
    assert renderer.decode_marked(one) == "<|user|><|end|><|assistant|>⟦4<|end|>⟧"
    assert renderer.decode_marked(two) == "<|system|><|end|><|user|><|end|><|assistant|>⟦4<|end|>⟧"
