"""anatomy: experts are part of their layer; anatomy."""

from __future__ import annotations

import pytest
import transformers as t
from torch import nn

from helpers.subset_tuners import LLAMA, MADE, MOE, base, put
from luthier.errors import RecipeError
from luthier.model.anatomy import kind_of, layer_of, part_of
from luthier.registry import build


def test_experts_are_part_of_their_layer():
    """Fused experts move with the layer they stand in; a method that cannot reach them says so."""
    model = base("qwen_moe")
    experts = [n for n, _ in model.named_parameters() if ".experts." in n]
    assert experts and set(experts) <= set(put("lisa", model).names)
    assert any("experts.down_proj" in n for n in put("cofitune", base("qwen_moe")).names)
    refused = t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**LLAMA, **{k: v for k, v in MOE.items() if "shared" not in k})
    )
    with pytest.raises(RecipeError, match="no separate linear module for d_ratio"):
        build("tuner", "s2ft").attach(refused)
    build("tuner", {"name": "s2ft", "d_ratio": 0, "o_ratio": 0.25}).attach(refused)


@pytest.mark.parametrize("kind", MADE)
def test_anatomy(kind):
    """Every layer's matrices are known by their part."""
    model = base(kind)
    parts = {
        part_of(n)
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, t.pytorch_utils.Conv1D)) and layer_of(f"{n}.")
    }
    assert {"o", "up", "down"} <= parts and ({"q", "k", "v"} <= parts or "qkv" in parts)
    places = {p for n, _ in model.named_parameters() if (p := layer_of(n))}
    assert len(places) == 4 and {kind_of(n) for n, _ in model.named_parameters() if layer_of(n)} == {
        "attention",
        "feed-forward",
        "norm",
    }
