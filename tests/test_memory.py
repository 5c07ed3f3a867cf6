"""Memory is known before a step: what moves exactly, what backward keeps by asking."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import zoo
from luthier import memory
from luthier.clock import Clock
from luthier.method import build
from luthier.roles import Policy, Roles
from luthier.transforms._chain import Chain


def need(tuner="full", estimator="backprop", optimizer="adamw", tokens=None, checkpointing=False):
    model = zoo.make("llama")
    attached = build("tuner", tuner).attach(model)
    roles = Roles(Policy(build("architecture", "causal"), model, attached), Clock(), None)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    chain = Chain(build("optimizer", optimizer).chain(), attached, Clock(), 1e-3)
    batch = zoo.rows()
    return memory.predict(roles, chain, build("estimator", estimator), batch, tokens or len(batch.ids)), model


def test_what_moves_is_counted_exactly():
    full, model = need()
    size = sum(p.numel() for p in model.parameters())
    assert (full.moving, full.state) == (4 * size, 8 * size)
    assert need(optimizer={"name": "sgd", "momentum": 0.0})[0].state < 8 * size
    lora = need({"name": "lora", "r": 2})[0]
    assert lora.moving < full.moving / 4 and lora.activations > 0


def test_what_backward_keeps():
    """Grows with the tokens, shrinks when it is made again, and is nothing without a backward pass."""
    once, twice = need()[0], need(tokens=2 * len(zoo.rows().ids))[0]
    assert twice.activations == pytest.approx(2 * once.activations, rel=0.01)
    assert need(checkpointing=True)[0].activations < once.activations
    assert need(estimator="mezo")[0].activations == 0
