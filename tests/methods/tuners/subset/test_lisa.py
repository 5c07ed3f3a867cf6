"""lisa: which layers move, how evenly they are drawn, and the optimizer's state of frozen ones."""

from __future__ import annotations

import torch

from helpers.subset_tuners import put, state_bytes, train
from helpers.tuners import base, logprobs
from helpers.tuners import put as put_base
from helpers.tuners import train as train_base
from luthier.clock import Clock
from luthier.methods.estimators._base import gradients
from luthier.model.anatomy import layer_of
from luthier.registry import build
from luthier.train.optimizer import Chain


def test_lisa_moves_what_it_says():
    attached = put_base("lisa", n_layers=1, interval=3)
    clock = Clock(seed=2, total=18)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    seen = []
    for clock.step in range(18):
        before = attached.tensors()
        attached.begin_step(clock)
        (-logprobs(attached)).mean().backward()
        chain.step(gradients(chain))
        for p in attached.parameters().values():
            p.grad = None
        moved = {k for k, v in attached.tensors().items() if not torch.equal(v, before[k])}
        layers = {k.split(".")[2] for k in moved if ".layers." in k}
        assert (
            len(layers) == 1
            and {"model.embed_tokens.weight.weight", "lm_head.weight.weight", "model.norm.weight.weight"}
            <= moved
        )
        # the optimizer forgets frozen layers
        assert {n.split(".")[2] for n in chain.state if ".layers." in n} == layers
        seen.append(layers.pop())
    assert all(len(set(seen[i : i + 3])) == 1 for i in range(0, 18, 3)) and len(set(seen)) == 2


def test_lisa_draws_evenly_and_forgets_nothing_when_all_move():
    attached = put_base("lisa", base(), n_layers=1, interval=1)
    counts = torch.zeros(2)
    for step in range(500):
        attached.begin_step(Clock(seed=0, step=step))
        live = {k.split(".")[2] for s in attached.param_groups() for k in [s.name] if ".layers." in k}
        counts[int(live.pop())] += 1
    assert abs(counts[0] / 500 - 0.5) < 3 * (0.25 / 500) ** 0.5
    one, two = train_base(put_base("lisa", n_layers=2, interval=1), 4), train_base(put_base("full"), 4)
    assert all(torch.allclose(v, two.tensors()[k], atol=1e-6) for k, v in one.tensors().items())


def test_lisa_keeps_state_of_what_moves_only():
    attached = put("lisa", n_layers=1, interval=2)
    sizes = []
    for first in range(0, 8, 2):
        chain = train(attached, first + 2, first=first, total=8)
        live = {layer_of(n) for n in chain.state if layer_of(n)}
        sizes.append(state_bytes(chain.state))
        assert len(live) == 1
    moving = sum(p.numel() for s in attached.param_groups() for p in s.params.values())
    assert set(sizes) == {8 * moving} and sizes[0] < 0.5 * state_bytes(train(put("full"), 1).state)
