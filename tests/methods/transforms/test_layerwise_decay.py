"""layerwise_decay: layerwise rates are the formula."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama
from luthier.clock import Clock
from luthier.registry import build


def test_layerwise_rates_are_the_formula():
    from luthier.train.optimizer import Chain

    model = make_llama()
    attached = build("tuner", "full").attach(model)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    chain = Chain(
        [build("transform", {"name": "layerwise_decay", "decay": 0.5})], attached, Clock(seed=0, total=1), 0.1
    )
    chain.step({s.name: {k: torch.ones_like(p) for k, p in s.params.items()} for s in chain.param_groups()})
    step = {k: float((before[k] - p).mean()) for k, p in model.named_parameters()}
    assert [step[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)] == pytest.approx(
        [0.1 * 0.5 ** (3 - i) for i in range(4)], rel=1e-3
    )
    assert step["model.embed_tokens.weight"] == pytest.approx(0.1 * 0.5**4, rel=1e-3) and step[
        "model.norm.weight"
    ] == pytest.approx(0.1, rel=1e-3)
