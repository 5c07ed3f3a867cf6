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
