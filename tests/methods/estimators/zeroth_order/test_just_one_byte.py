"""just_one_byte: replicas that exchange bytes stay alike, and are replayed from them; it is MeZO for one."""

from __future__ import annotations

import math
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.optimizers import Rig, Seen, same
from luthier.clock import Clock
from luthier.methods.estimators.zeroth_order.just_one_byte import encoded, in_turn, log_of, replay, restored
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import build
from luthier.train.optimizer import Chain

SGD = {"name": "sgd", "max_grad_norm": 0}


def rig(**settings):
    settings = {"name": "just_one_byte"} | settings
    return Rig(estimator=settings, transforms=build("optimizer", SGD).chain(), total=50)


class Wire:
    """Stands for the processes of a run: what one of several threads sends reaches all of them."""

    def __init__(self, count):
        self.barrier, self.values, self.sent = threading.Barrier(count, timeout=30), [None] * count, []

    def gather(self, index, value):
        self.values[index] = value
        self.sent.append(len(value))
        self.barrier.wait()
        everyone = list(self.values)
        self.barrier.wait()
        return everyone


def replica(index, wire, count=2, micro_batches=3):
    """A rig whose rows are its own: micro-batch i has a target of its own."""
    run = rig()
    plain = run.closure

    def closure(grad=False):
        raise AssertionError("the loss of all processes is not asked for")

    def own_loss(i):
        shift = 0.1 * (index + i * count)
        extra = sum(float((p.detach() * shift).sum()) for p in run.tuner.parameters().values())
        return plain(grad=False) + extra

    processes = SimpleNamespace(index=index, count=count, gather=partial(wire.gather, index), sum=lambda x: x)
    closure.trainer, closure.own_loss = SimpleNamespace(processes=processes), own_loss
    closure.batches = [None] * micro_batches
    run.closure = closure
    return run


def test_a_slope_is_one_byte():
    for slope in (0.0, 1.0, -1.0, 3e-3, -250.0, math.exp(7.8), -math.exp(-7.8)):
        code = encoded(slope)
        assert -127 <= code <= 127 and restored(code) == pytest.approx(slope, rel=0.065)
    assert encoded(1e30) == 127 and encoded(-1e-30) == -1
    assert [encoded(restored(code)) for code in range(-127, 128)] == list(range(-127, 128))


@pytest.mark.long
def test_replicas_stay_alike_and_are_replayed():
    wire = Wire(2)
    runs = [replica(index, wire) for index in range(2)]
    start = runs[0].tuner.tensors()
    threads = [threading.Thread(target=run.go, args=[50]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(*runs) and runs[0].clock.step == 50
    assert not same(runs[0], rig()) and wire.sent == [3] * 100

    log = log_of(runs[1].chain.state)
    assert [len(codes) for codes in log] == [6] * 50
    again = rig()
    assert all(torch.equal(p, start[k]) for k, p in again.tuner.tensors().items())
    replay(again.estimator, log, again.chain)
    assert same(again, runs[0]) and again.calls == 0 and log_of(again.chain.state) == log


def test_bytes_are_in_the_order_of_micro_batches():
    assert in_turn([[0, 1, 4, 5], [2, 3]], 2) == [0, 1, 2, 3, 4, 5] and in_turn([b"", b""], 1) == b""


@pytest.mark.parametrize("n_probes", [1, 2])
def test_without_rounding_one_process_is_mezo(n_probes):
    ours = rig(one_byte=False, n_probes=n_probes).go(10)
    mezo = {"name": "mezo", "n_probes": n_probes}
    theirs = Rig(estimator=mezo, transforms=build("optimizer", SGD).chain(), total=50).go(10)
    assert same(ours, theirs) and ours.losses == theirs.losses
    assert not same(ours, rig(n_probes=n_probes).go(10))


def test_it_points_along_the_gradient():
    """On a quadratic, whose gradient is a closed form; by the root the same bytes make a longer step."""
    torch.manual_seed(0)
    goal, sums = torch.randn(16), {}
    for divide_by in ("count", "root"):
        model = nn.Linear(16, 1, bias=False)
        nn.init.zeros_(model.weight)
        tuner = TunedWeights(SimpleNamespace(name="toy"), model, lambda name, p: True)
        chain = Chain((seen := Seen(),), tuner, Clock(), 0.0)
        settings = {"name": "just_one_byte", "n_probes": 400, "divide_by": divide_by}
        loss = lambda grad, w=model.weight: float((w.detach()[0].double() - goal.double()).square().sum())
        build("estimator", settings).step(loss, chain, chain.clock)
        sums[divide_by] = next(iter(seen.grads.values()))[0]
    assert torch.cosine_similarity(sums["count"], -2 * goal, 0) > 0.9
    assert torch.allclose(sums["root"], 20 * sums["count"], rtol=1e-4)
