"""telly: telly."""

from __future__ import annotations

import pytest
import torch

from helpers.subset_tuners import IDS, base, loss_of, put, state_bytes, train
from luthier.errors import RecipeError
from luthier.model.anatomy import layer_of


def test_telly():
    attached = put("telly", k=2)
    model, untuned = attached.model, base()
    loss_of(model).backward()
    assert all(
        (p.grad is None) == (n.startswith(("model.embed", "model.layers.0", "model.layers.1")))
        for n, p in model.named_parameters()
    )
    train(attached)
    hidden = lambda m: m(IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(hidden(model)[:3], hidden(untuned)[:3], strict=True))
    assert not torch.equal(hidden(model)[3], hidden(untuned)[3])
    assert {layer_of(n)[1] for n in put("telly").names if layer_of(n)} == {3}  # three quarters of four
    assert {layer_of(n)[1] for n in put("telly", k=0).names if layer_of(n)} == {
        0,
        1,
        2,
        3,
    } and "model.embed_tokens.weight" not in put("telly", k=0).names
    with pytest.raises(RecipeError, match="leaves none of the 4 layers"):
        put("telly", k=4)
    fewer = [state_bytes(train(put("telly", k=k), 1).state) for k in (0, 1, 2, 3)]
    assert fewer == sorted(fewer, reverse=True)
