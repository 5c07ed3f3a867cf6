"""apet: moves as many as it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.subset_tuners import base, changed, put, say, train
from luthier.errors import RecipeError
from luthier.registry import build


def test_apet_moves_as_many_as_it_says():
    one, two, other = put("apet", n=123), put("apet", n=123), put("apet", n=123, selection_seed=1)
    places = lambda a: {n: m.tensors("default").indices.tolist() for n, m in a.layers.items()}
    assert places(one) == places(two) != places(other)
    assert sum(p.numel() for p in one.parameters().values()) == 123
    train(one)
    assert changed(one, base()) == 123
    chosen = sum(
        m.weight.numel() for n, m in base().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )
    whole = put("apet", n=chosen)
    full = build(
        "tuner",
        {
            "name": "cofitune",
            "layer_range": [0, 1],
            "modules": ["qkv", "o", "up", "gate", "down"],
            "soft_mask": False,
        },
    ).attach(base())
    train(whole), train(full)
    assert torch.allclose(say(whole.model), say(full.model), atol=1e-4)
    with pytest.raises(RecipeError, match="parameters, but the chosen modules have"):
        put("apet", n=10**9)


def test_apet_at_all_biases_is_bitfit():
    """Positions at all biases of the linear modules: the trajectory of BitFit on these."""
    biases = sum(m.nf for m in base("gpt2").modules() if type(m).__name__ == "Conv1D")
    mask, bitfit = put("apet", base("gpt2"), n=biases, of="biases"), put("bitfit", base("gpt2"))
    for name, p in bitfit.model.named_parameters():
        p.requires_grad_(name.endswith("bias") and "ln_" not in name)
    train(mask), train(bitfit)
    assert torch.allclose(say(mask.model), say(bitfit.model), atol=1e-5)
    with mask.merged():
        own = {n.replace(".base_layer", ""): p for n, p in mask.model.named_parameters()}
        moved = {n for n, p in base("gpt2").named_parameters() if not torch.equal(own[n], p)}
    assert moved == {n for n, p in bitfit.model.named_parameters() if p.requires_grad}
    some = put("apet", base("gpt2"), n=50, of="all")
    assert sum(p.numel() for p in some.parameters().values()) == 50
    train(some)
    assert changed(some, base("gpt2")) == 50
    with pytest.raises(RecipeError, match="no biases"):
        put("apet", n=10, of="biases")
