"""prompt: starts."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from helpers.tuners import put
from luthier.errors import RecipeError
from luthier.registry import build


def test_prompt_starts(tiny):
    model = LlamaForCausalLM.from_pretrained(tiny)
    table = model.get_input_embeddings().weight.detach()
    text = put(
        "prompt",
        copy.deepcopy(model),
        prompt_tuning_init="text",
        prompt_tuning_init_text="ab",
        num_virtual_tokens=3,
    )
    soft = text.soft().detach()
    assert torch.equal(soft[0], soft[2]) and (table == soft[1]).all(1).any()
    drawn = put("prompt", model, num_virtual_tokens=5).soft().detach()
    assert all((table == v).all(1).any() for v in drawn) and len(drawn.unique(dim=0)) == 5
    with pytest.raises(RecipeError, match="need each other"):
        build("tuner", {"name": "prompt", "prompt_tuning_init": "text"})


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow
