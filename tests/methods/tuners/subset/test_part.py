"""part: moves exactly what it names."""

from __future__ import annotations

import pytest

from helpers.subset_tuners import base, put
from luthier.errors import RecipeError


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "t5"])
def test_part_moves_exactly_what_it_names(kind):
    names = put("part", base(kind), part="embeddings").names
    assert names == {
        "llama": ["model.embed_tokens.weight", "lm_head.weight"],
        "tied": ["model.embed_tokens.weight"],
    }.get(kind, ["transformer.wte.weight"] if kind == "gpt2" else names)
    if kind == "t5":
        assert set(names) <= {"shared.weight", "lm_head.weight"}
    last = {
        "llama": "model.layers.3.",
        "tied": "model.layers.3.",
        "gpt2": "transformer.h.3.",
        "t5": "decoder.block.1.",
    }[kind]
    model = base(kind)
    assert put("part", model).names == [n for n, _ in model.named_parameters() if n.startswith(last)]


def test_the_head_alone_is_a_linear_probe():
    assert put("part", base("llama"), part="head").names == ["lm_head.weight"]
    with pytest.raises(RecipeError, match="shares its weight with the input embeddings"):
        put("part", base("tied"), part="head")
