"""mezo: is the finite difference along its directions; points along the gradient on average; is replayed
from its losses alone; solves a quadratic without a single backward pass.
"""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import luthier
from helpers.optimizers import Rig, Seen, same
from helpers.tuners import _shaped, asked
from helpers.tuners import base as make_base
from luthier.clock import Clock
from luthier.methods.estimators._base import perturbed
from luthier.methods.estimators.zeroth_order._by_layer import perturbed_by_layer, places
from luthier.methods.estimators.zeroth_order.mezo import direction
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import build
from luthier.train.optimizer import Chain
from luthier.train.trainer import Trainer


@pytest.mark.parametrize("n_probes", [1, 3])
def test_mezo_is_the_finite_difference_along_its_directions(n_probes):
    rig = Rig(estimator={"name": "mezo", "eps": 1e-2, "n_probes": n_probes}, transforms=(seen := Seen(),))
    start = rig.tuner.tensors()
    rig.chain.learning_rate = 0.0
    rig.go(1)
    clock = Clock(seed=3)
    want = {k: torch.zeros_like(p) for k, p in start.items()}
    for probe in range(n_probes):
        z = {
            f"{s.name}.{k}": direction(clock, probe, s.name, k, p)
            for s in rig.tuner.param_groups()
            for k, p in s.params.items()
        }
        sides = []
        for sign in (1, -1):
            with rig.tuner.using({k: start[k] + sign * 1e-2 * z[k] for k in z}):
                sides.append(rig.distance())
        for k in want:
            want[k] += (sides[0] - sides[1]) / 2e-2 * z[k] / n_probes
    assert all(torch.allclose(seen.grads[k], want[k], atol=1e-4) for k in want)
    assert same(rig, Rig())  # and nothing moved


@pytest.mark.long
def test_mezo_points_along_the_gradient_on_average():
    torch.manual_seed(0)
    goal = torch.randn(64)
    model = nn.Linear(64, 1, bias=False)
    tuner = TunedWeights(SimpleNamespace(name="toy"), model, lambda name, p: True)
    total = torch.zeros(64)

    class Sum(Seen):
        def apply(self, grads, state, group, step):
            total.add_(grads["weight"][0])
            return {k: torch.zeros_like(g) for k, g in grads.items()}

    chain, mezo = Chain((Sum(),), tuner, Clock(), 1.0), build("estimator", "mezo")
    for chain.clock.step in range(5000):
        mezo.step(lambda grad: float(model.weight.detach()[0].double() @ goal.double()), chain, chain.clock)
    assert torch.cosine_similarity(total, goal, 0) > 0.95


def test_mezo_is_replayed_from_its_losses_alone():
    first = Rig(estimator="mezo")
    log, real = [], first.closure
    first.closure = lambda grad: log.append(real(grad)) or log[-1]
    first.go(8)
    again, feed = Rig(estimator="mezo"), iter(log)
    again.closure = lambda grad: next(feed)
    assert same(first, again.go(8)) and not same(first, Rig())


@pytest.mark.long
def test_mezo_solves_a_quadratic_without_a_single_backward_pass():
    rig = Rig(estimator={"name": "mezo", "n_probes": 4}, transforms=(build("transform", "adam"),), total=300)
    real = rig.closure

    def closure(grad=True, only=None):
        assert not grad
        return real(grad)

    rig.closure = closure
    began = rig.closure(False)
    rig.go(300)
    assert rig.closure(False) < 0.05 * began and all(p.grad is None for p in rig.tuner.parameters().values())


class Live(TorchDispatchMode):
    """How many bytes of new tensors are alive at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(t):
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(t), storage.nbytes())
                self.largest = max(self.largest, t.numel())
        self.alive = {k: v for k, v in self.alive.items() if v[0]() is not None}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


def test_mezo_takes_one_copy_of_what_moves_and_nothing_of_what_is_frozen():
    model = nn.Sequential(
        *(nn.Linear(32, 32, bias=False) for _ in range(20)), nn.Linear(400, 400, bias=False)
    )
    tuner = TunedWeights(SimpleNamespace(name="toy"), model, lambda name, p: not name.startswith("20."))
    chain = Chain(build("optimizer", {"name": "sgd", "max_grad_norm": 0.1}).chain(), tuner, Clock(), 0.1)
    one, moving = 4 * 32 * 32, 4 * 20 * 32 * 32
    direction(chain.clock, 0, "", "", torch.empty(4))  # a table is made once a process
    with Live() as live:
        build("estimator", {"name": "mezo", "n_probes": 2}).step(
            lambda grad: float(len(live.alive)), chain, chain.clock
        )
    assert live.largest <= 32 * 32 and moving <= live.peak <= moving + 5 * one


@pytest.mark.long
@pytest.mark.parametrize("of", ["accuracy", "f1"])
def test_mezo_raises_a_metric(of):
    """A linear readout of features that it can separate, under a loss that is constant almost everywhere."""
    from helpers.objectives import batch_of

    torch.manual_seed(0)
    answers = {"accuracy": [[6], [7]], "f1": [[6, 8], [7, 9]]}[of]
    rows = [{"id": i, "prompt": [3], "completions": [answers[i % 2]]} for i in range(16)]
    batch = batch_of(rows)
    kinds = torch.nn.functional.one_hot(batch.labels[batch.supervised] - 6, 4).float()
    features = kinds @ torch.randn(4, 8) + 0.1 * torch.randn(len(kinds), 8)
    model = nn.Linear(8, 12, bias=False)
    tuner = TunedWeights(SimpleNamespace(name="toy"), model, lambda name, p: True)
    outputs = SimpleNamespace(first=lambda: model(features).argmax(1))
    roles = SimpleNamespace(policy=SimpleNamespace(outputs=lambda batch: outputs))
    objective = build("objective", {"name": "metric", "of": of})

    def closure(grad: bool = False) -> float:
        assert not grad
        return float(objective.loss(roles, batch).mean())

    mezo = build("estimator", {"name": "mezo", "eps": 1.0, "n_probes": 8})
    chain = Chain((build("transform", "adam"),), tuner, Clock(), 0.05)
    before = closure()
    for chain.clock.step in range(100):
        mezo.step(closure, chain, chain.clock)
    assert before >= 0.5 and closure() < 0.1


class Held(TorchDispatchMode):
    """How many bytes of storage, besides what already exists, are held at most."""

    def __init__(self, *there):
        super().__init__()
        self.there = {p.untyped_storage()._cdata for p in there}
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(t) and (storage := t.untyped_storage())._cdata not in self.there:
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {k: v for k, v in self.held.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.held.values()))
        return out


def at_both_points(way, chain, answer):
    """What `answer` says with every weight a small step aside, and at the point opposite."""

    def aside(group, slot, p):
        return direction(chain.clock, 0, group.name, slot, p, "normal", 1e-2, p.dtype)

    with torch.no_grad(), way(chain, aside) as flip:
        there = answer()
        flip()
        return there, answer()


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "moe", "bert"])
def test_layer_by_layer_is_all_at_once_and_is_undone_bit_for_bit(kind):
    model = copy.deepcopy(_shaped(kind))
    attached = build("tuner", "full").attach(model)
    chain = Chain([], attached, Clock(seed=3), 0.0)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    found = [
        at_both_points(way, chain, lambda: asked(model, attached)) for way in (perturbed, perturbed_by_layer)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(*found[1])
    for n, p in model.named_parameters():
        assert p.data_ptr() == before[n][0] and torch.equal(p, before[n][1])
    size = sum(p.nbytes for p in model.parameters())
    assert places(chain).displaced_bytes() < size
    lora = build("tuner", {"name": "lora", "r": 2, "target_modules": "all-linear"}).attach(
        copy.deepcopy(model)
    )
    assert not places(Chain([], lora, Clock(), 0.0)).layers  # few numbers: all at once


def test_other_tensors_and_errors_within_a_layer():
    """Tensors that stand in for the weights (a role's) are not displaced; after an error all is as it was."""
    model = make_base()
    attached = build("tuner", "full").attach(model)
    chain = Chain([], attached, Clock(seed=3), 0.0)
    start = attached.tensors()
    want = asked(model, attached).detach()

    def initial():
        with attached.using(start):
            return asked(model, attached)

    there, opposite = at_both_points(perturbed_by_layer, chain, initial)
    assert torch.equal(there, want) and torch.equal(opposite, want)
    norm = model.model.layers[1].post_attention_layernorm
    hook = norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        at_both_points(perturbed_by_layer, chain, lambda: asked(model, attached))
    hook.remove()
    assert all(torch.equal(t, start[n]) for n, t in attached.tensors().items())
    assert torch.equal(asked(model, attached), want)


@pytest.mark.long
@pytest.mark.parametrize("tuner", [{"name": "lora", "r": 32}, "full"])
def test_a_run_with_mezo_takes_the_memory_of_inference_and_of_what_is_displaced(
    base, tmp_path, monkeypatch, tuner
):
    """Measured on every step of luthier.tune, on the rows of that step; a run with a backward pass takes
    more.
    """
    found, step = {"mezo": [], "backprop": []}, Trainer.step

    def measured(self):
        roles, clock = self.roles, self.roles.clock
        rows = [dict(r) for r in self.batches.draw(self.rows, clock)]
        there = (*roles.policy.model.parameters(), *roles.policy.model.buffers())
        with torch.no_grad(), Held(*there) as inference:
            roles.policy.logprobs(roles.batch(rows, training=True))
        with Held(*there) as whole:
            log = step(self)
        moving = [p.nbytes for p in roles.tuner.parameters().values()]
        aside = places(self.chain).displaced_bytes()
        found[name].append((whole.peak, inference.peak, aside, sum(moving), max(moving)))
        return log

    monkeypatch.setattr(Trainer, "step", measured)
    for name in found:
        asked = base | {
            "tuner": tuner,
            "estimator": name,
            "optim": {"name": "sgd", "max_grad_norm": 0},
            "max_steps": 3,
        }
        # enough rows that what backward keeps outweighs a copy of what moves
        asked["per_device_train_batch_size"] = 16
        luthier.tune(asked, folder=tmp_path / name)
    for peak, inference, aside, moving, largest in found["mezo"]:
        # three: a direction, its length, and their sum with one tensor
        assert aside <= peak <= inference + aside + 3 * largest
        assert aside < 0.6 * moving  # one layer, and what is outside of layers
    assert max(m[0] for m in found["mezo"]) < min(b[0] for b in found["backprop"])
