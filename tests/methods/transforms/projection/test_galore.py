"""galore: galore."""

from __future__ import annotations

import torch

from helpers.subset_tuners import put, train


def test_galore():
    """Full rank is Adam; a low rank keeps that many rows of state, and its update lies in the gradient's main
    directions.
    """
    one, two = put("full"), put("full")
    train(one, 4), train(two, 4, transform={"name": "galore", "rank": 64, "scale": 1.0})
    assert all(torch.allclose(v, two.tensors()[k], atol=1e-5) for k, v in one.tensors().items())
    three = put("full")
    start = three.tensors()
    chain = train(three, 4, transform={"name": "galore", "rank": 4, "scale": 1.0})
    name = "model.layers.0.mlp.up_proj.weight"
    assert chain.state[name]["0"]["inner"]["0"]["weight"]["m"].shape == (64, 4)
    delta = three.tensors()[f"{name}.weight"] - start[f"{name}.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4
    assert chain.state["lm_head.weight"]["0"]["inner"]["0"]["weight"]["m"].shape == (97, 32)
