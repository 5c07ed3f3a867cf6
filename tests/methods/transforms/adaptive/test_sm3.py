"""sm3: is the authors' sum; of all entries is dense; keeps the statistics of spiel's growth ma."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers.tuners import logprobs, put
from helpers.weight_tuners import Q
from luthier.clock import Clock
from luthier.methods.estimators._base import gradients
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import build
from luthier.train.optimizer import Chain


def places(indices, shape):
    """Something that says where the numbers of a tensor lie in a matrix."""
    return SimpleNamespace(components=[SimpleNamespace(entry_places=lambda group, slot: (indices, shape))])


def steps(grads, attached=None, **settings):
    sm3, state = build("transform", {"name": "sm3", **settings}).bind(attached), {}
    group = ParamGroup("w", {"values": torch.zeros_like(grads[0])})
    return [sm3.apply({"values": g}, state, group, i + 1)["values"] for i, g in enumerate(grads)]


def test_sm3_is_the_authors_sum():
    """SM3-II by hand: the smaller of row and column plus the square; rows and columns keep the largest."""
    torch.manual_seed(0)
    grads = [torch.randn(5, 4) for _ in range(3)]
    rows, columns, want = torch.zeros(5), torch.zeros(4), []
    for g in grads:
        nu = torch.zeros(5, 4)
        for i in range(5):
            for j in range(4):
                nu[i, j] = min(rows[i], columns[j]) + g[i, j] ** 2
        rows, columns = nu.max(1).values, nu.max(0).values
        want.append(g / (nu + 1e-8).sqrt())
    assert torch.allclose(torch.stack(steps(grads)), torch.stack(want), atol=1e-6)
    averaged = steps(grads, sm3_momentum=0.5)
    assert torch.allclose(averaged[1], 0.25 * want[0] + 0.5 * want[1], atol=1e-6)


def test_sm3_of_all_entries_is_dense():
    torch.manual_seed(0)
    grads, order = [torch.randn(5, 4) for _ in range(3)], torch.randperm(20)
    sparse = steps([g.flatten()[order] for g in grads], places(order, (5, 4)))
    for ours, dense in zip(sparse, steps(grads), strict=True):
        assert torch.allclose(ours, dense.flatten()[order], atol=1e-6)


def test_sm3_keeps_the_statistics_of_growth_ma():
    growth = dict(selection_algorithm="ma", reselection_steps=4, selection_accumulation_steps=2)
    attached = put("spiel", density=0.05, **growth)
    clock = Clock(seed=3, total=6)
    chain = Chain([build("transform", "sm3")], attached, clock, 0.01)
    before = attached.layers[Q].tensors("default").indices.clone()
    for clock.step in range(6):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        logprobs(attached).mean().neg().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
    state, stats = chain.state[Q]["0"]["values"], attached.gathered[Q]
    assert not torch.equal(before, attached.layers[Q].tensors("default").indices)
    assert torch.allclose(state["rows"][:, 0], stats["rows"])
    assert torch.allclose(state["columns"][0], stats["columns"])
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in stats.values())
