"""Estimators, transforms, optimizers: contracts of every file, agreement with torch, and what MeZO and SAM
claim.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import luthier
from conftest import SUMS
from luthier.clock import Clock
from luthier.errors import Refused
from luthier.methods.estimators.zeroth_order.mezo import direction
from luthier.methods.transforms._base import LazyGradients, Transform
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.recipe.schedule import schedule
from luthier.registry import build, find, helps, names
from luthier.storage import checkpoints
from luthier.train import optimizer as _chain
from luthier.train.optimizer import Chain
from luthier.train.trainer import Trainer, draw

ESTIMATORS = [
    n for n in names("estimator") if not find("estimator", n).requires
]  # others want more than any moving tensors: tested where it is
TRANSFORMS, OPTIMIZERS = names("transform"), names("optimizer")


class Toy(nn.Module):
    """A matrix, a vector and a factorised pair that move, and a large frozen matrix."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.A, self.B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        self.frozen = nn.Parameter(torch.randn(64, 64))


class Moving(TunedWeights):
    """A tuner on the toy: each tensor a site of its own, A and B together."""

    def __init__(self, model):
        super().__init__(
            SimpleNamespace(name="toy", r=2, lora_alpha=2), model, lambda name, p: name != "frozen"
        )

    def all_param_groups(self):
        m = self.model
        slots = {
            "weight": {"weight": m.weight},
            "bias | norm": {"weight": m.bias},
            "low": {"A": m.A, "B": m.B},
        }
        return [ParamGroup(name, tensors, self.settings) for name, tensors in slots.items()]


class Rig:
    """A toy, a chain and an estimator: minimises the mean square distance to a target."""

    def __init__(
        self, transforms=(), estimator="backprop", learning_rate=0.05, dtype=torch.float32, total=8, seed=0
    ):
        self.model = Toy(seed).to(dtype)
        self.tuner = Moving(self.model)
        self.clock = Clock(seed=3, total=total)
        self.chain = Chain(
            transforms, self.tuner, self.clock, learning_rate, schedule("linear", 0, 2 * total)
        )
        self.estimator = build("estimator", estimator)
        torch.manual_seed(9)
        self.target = {k: torch.randn(p.shape) for k, p in self.tuner.parameters().items()}
        self.losses, self.fail_at, self.calls = [], None, 0

    def closure(self, grad: bool = True, only=None) -> float:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        own = self.tuner.parameters()
        for p in own.values():
            p.grad = None if grad else p.grad
        with torch.set_grad_enabled(grad):
            loss = sum(((p.float() - self.target[k]) ** 2).mean() for k, p in own.items())
            if grad:
                loss.backward()
        return float(loss.detach())

    def go(self, steps: int) -> Rig:
        for _ in range(steps):
            self.losses.append(self.estimator.step(self.closure, self.chain, self.clock))
            self.clock.step += 1
        return self

    def distance(self) -> float:
        with torch.no_grad():
            return self.closure(grad=False)

    def kill_and_load(self, folder, make) -> Rig:
        """Through a checkpoint on disk into a new process."""
        made = checkpoints.Checkpoint(self.tuner.tensors(), self.chain.state, self.clock.step, None, {})
        was = checkpoints.load(checkpoints.save(folder, made, 2))
        other = make()
        other.tuner.load(was.tensors)
        other.chain.load(was.state)
        other.clock.step = other.clock.first = was.step
        return other


def same(a: Rig, b: Rig) -> bool:
    x, y = a.tuner.tensors(), b.tuner.tensors()
    return all(torch.equal(x[k], y[k]) for k in x)


def skipped(cls, test: str) -> None:
    if test in cls.contract:
        pytest.skip(f"{cls.name}: {cls.contract[test]}")


# ------------------------------------------------------------------------------------------ estimators


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_make_the_loss_smaller_and_leave_the_rest_alone(name):
    skipped(find("estimator", name), "descends")
    rig = Rig(estimator=name, transforms=build("optimizer", "adamw").chain(), total=200)
    began, frozen = rig.distance(), rig.model.frozen.detach().clone()
    rig.go(200)
    assert rig.distance() < 0.7 * began and torch.equal(rig.model.frozen, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_go_on_bit_for_bit(name, dtype, tmp_path):
    def make():
        return Rig(estimator=name, transforms=build("optimizer", "adamw").chain(), dtype=dtype)

    whole, broken = make().go(8), make().go(3).kill_and_load(tmp_path, make).go(5)
    assert same(whole, broken) and whole.losses[3:] == broken.losses


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_put_back_what_they_moved_when_memory_runs_out(name, dtype, call):
    skipped(find("estimator", name), "restores")

    def make():
        settings = {"n_probes": 2} if name == "mezo" else {}
        return Rig(
            estimator={"name": name, **settings}, transforms=build("optimizer", "adamw").chain(), dtype=dtype
        ).go(1)

    rig, calm = make(), make()
    before, places = rig.tuner.tensors(), {k: p.data_ptr() for k, p in rig.tuner.parameters().items()}
    rig.calls, rig.fail_at = 0, call
    try:
        rig.go(1)
    except RuntimeError:
        after = rig.tuner.parameters()
        assert all(torch.equal(before[k], after[k]) and after[k].data_ptr() == places[k] for k in before)
        rig.go(1)  # the loop tries again with smaller micro-batches
    assert same(rig, calm.go(1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_train_a_language_model(name, base, tmp_path):
    change = {"estimator": name, "data": SUMS[:4], "max_steps": 40, "learning_rate": 2e-3, "save_steps": 40}
    change |= {"objective": "sft + kl"} if name == "gradient_dropout" else {}
    losses = luthier.tune(base | change | {"lr_scheduler_type": "constant"}, folder=tmp_path).losses
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


# ------------------------------------------------------------------------------------------ transforms


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_keep_their_promises(name, tmp_path):
    """Finite updates of the right shape; gradients and weights are only read; state survives a checkpoint bit
    for bit.
    """
    skipped(find("transform", name), "promises")

    def make():
        return Rig(transforms=(build("transform", name),))

    rig = make()
    param_groups = {s.name: s for s in rig.chain.param_groups()}
    rig.closure()
    grads = {n: {k: p.grad for k, p in s.params.items()} for n, s in param_groups.items()}
    kept = {n: {k: g.clone() for k, g in slots.items()} for n, slots in grads.items()}
    weights = rig.tuner.tensors()
    transform = rig.chain.transforms[0]
    gathered = transform.gather(grads)
    for n, group in param_groups.items():
        out = transform.apply(gathered[n], {}, group, 1)
        assert all(u.shape == group.params[k].shape and u.isfinite().all() for k, u in out.items())
        assert all(torch.equal(grads[n][k], kept[n][k]) for k in kept[n])
    assert all(torch.equal(p, weights[k]) for k, p in rig.tuner.parameters().items())
    assert same(make().go(8), make().go(3).kill_and_load(tmp_path, make).go(5))


@pytest.mark.parametrize("kind", ["estimator", "transform", "optimizer"])
def test_every_setting_is_explained(kind):
    silent = [
        f"{name}.{key}" for name in names(kind) for key, said in helps(find(kind, name)).items() if not said
    ]
    assert not silent


# ------------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_descend_and_go_on_bit_for_bit(name, tmp_path):
    skipped(find("optimizer", name), "descends")

    def make():
        return Rig(transforms=build("optimizer", {"name": name, "weight_decay": 0.01}).chain(), total=200)

    whole = make()
    began = whole.distance()
    whole.go(200)
    assert whole.distance() < 0.7 * began
    assert same(whole, make().go(17).kill_and_load(tmp_path, make).go(183))


def against_torch(ours, theirs, steps: int = 20, clip: float = 0.0) -> float:
    """The largest difference between our chain and a torch optimizer on the same gradients, over all
    steps.
    """
    rig, other = Rig(transforms=ours.chain(), total=steps), Rig(total=steps)
    rig.chain.factor = lambda step: 1.0
    own = other.tuner.parameters()
    matrices, vectors = ([p for p in own.values() if (p.ndim > 1) == m] for m in (True, False))
    optimizer = theirs([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    worst = 0.0
    for _ in range(steps):
        rig.go(1)
        other.closure()
        if clip:
            nn.utils.clip_grad_norm_(list(own.values()), clip)
        optimizer.step()
        worst = max(
            worst, *(float((p - own[k]).detach().abs().max()) for k, p in rig.tuner.parameters().items())
        )
    return worst


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_adamw_is_torchs(clip):
    ours = build(
        "optimizer", {"name": "adamw", "weight_decay": 0.1, "max_grad_norm": clip, "adam_beta2": 0.95}
    )
    assert (
        against_torch(
            ours, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, betas=(0.9, 0.95)), clip=clip
        )
        < 1e-6
    )


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum, nesterov):
    ours = build(
        "optimizer",
        {
            "name": "sgd",
            "weight_decay": 0.1,
            "max_grad_norm": 0.3,
            "momentum": momentum,
            "nesterov": nesterov,
        },
    )
    theirs = lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=momentum, nesterov=nesterov)
    assert against_torch(ours, theirs, clip=0.3) < 1e-6


def test_lion_by_its_closed_form():
    lion = build("optimizer", {"name": "lion", "weight_decay": 0.1, "max_grad_norm": 0})
    rig, plain = Rig(transforms=lion.chain(), total=10), Rig(total=10)
    rig.chain.factor = lambda step: 1.0
    moments = {k: torch.zeros_like(p) for k, p in plain.tuner.parameters().items()}
    for _ in range(10):
        rig.go(1)
        plain.closure()
        for k, p in plain.tuner.parameters().items():
            m, decay = moments[k], 0.1 if p.ndim > 1 else 0.0
            p.data -= 0.05 * ((0.9 * m + 0.1 * p.grad).sign() + decay * p.data)
            moments[k] = 0.99 * m + 0.01 * p.grad
    assert all(
        torch.allclose(p, plain.tuner.parameters()[k], atol=1e-6) for k, p in rig.tuner.parameters().items()
    )


def test_lion_moves_every_weight_alike_and_without_memory_is_the_sign():
    rig = Rig(transforms=(build("transform", {"name": "lion", "beta1": 0.0, "beta2": 0.0}),), total=4)
    for _ in range(4):
        before = rig.tuner.tensors()
        rate = rig.chain.rate
        rig.go(1)
        for k, p in rig.tuner.parameters().items():
            assert torch.allclose(before[k] - p, rate * p.grad.sign(), atol=1e-6)
    size = lambda chain: sum(t.numel() for t in checkpoints.flatten(chain.state)[0].values())
    assert 2 * size(rig.chain) == size(Rig(transforms=(build("transform", "adam"),)).go(1).chain)


# ------------------------------------------------------------------------------------------ the chain


def test_bfloat16_moves_through_float32_masters():
    """Steps too small to show in bfloat16 add up; the weight is always its master, rounded."""
    rig = Rig(transforms=(build("transform", "adam"),), dtype=torch.bfloat16, learning_rate=1e-4, total=40)
    start = rig.tuner.tensors()
    rig.go(40)
    for group in rig.tuner.param_groups():
        for slot, p in group.params.items():
            master = rig.chain.state[group.name]["master"][slot]
            assert master.dtype == torch.float32 and torch.equal(p, master.bfloat16())
            assert not torch.equal(master, start[f"{group.name}.{slot}"].float())
    assert rig.distance() < 0.9999 * Rig(dtype=torch.bfloat16).distance()


def test_a_weight_that_somebody_rewrites_stays_rewritten():
    """A tuner may project or reset a bfloat16 weight after a step: the master follows, and where nothing was
    written it stays.
    """
    rig, free = (
        Rig(transforms=(build("transform", "adam"),), dtype=torch.bfloat16, learning_rate=1e-4).go(3)
        for _ in range(2)
    )
    with torch.no_grad():
        rig.model.weight[0] = 7.0
    rig.go(1)
    free.go(1)
    masters = [r.chain.state["weight"]["master"]["weight"] for r in (rig, free)]
    assert torch.allclose(masters[0][0], torch.tensor(7.0), atol=1e-2) and torch.equal(
        masters[0][1:], masters[1][1:]
    )


def test_state_lives_while_its_site_moves():
    rig = Rig(transforms=(build("transform", "adam"),)).go(2)
    assert set(rig.chain.state) == {"weight", "bias | norm", "low"} and rig.chain.state["low"]["step"] == 2
    rig.model.bias.requires_grad_(False)
    still = rig.model.bias.detach().clone()
    rig.go(1)
    assert set(rig.chain.state) == {"weight", "low"} and torch.equal(rig.model.bias, still)
    rig.model.bias.requires_grad_(True)
    rig.go(1)
    assert rig.chain.state["bias | norm"]["step"] == 1 and rig.chain.state["low"]["step"] == 4


def test_state_survives_the_disk_as_it_is(tmp_path):
    state = {
        "a | b||c": {"step": 3, "0": {"w": {"m": torch.ones(2), "share": 0.1}}, "on": True},
        "x": {"step": 1},
    }
    made = checkpoints.Checkpoint({"w": torch.ones(1)}, state, 5, None, {})
    back = checkpoints.load(checkpoints.save(tmp_path, made, 1)).state
    assert (
        back["a | b||c"]["step"] == 3
        and type(back["a | b||c"]["step"]) is int
        and back["a | b||c"]["on"] is True
    )
    assert back["a | b||c"]["0"]["w"]["share"] == 0.1 and torch.equal(
        back["a | b||c"]["0"]["w"]["m"], torch.ones(2)
    )


def test_state_comes_back_where_its_weights_are():
    """A checkpoint is read onto the CPU; what belongs to a weight elsewhere must follow it there."""
    rig, other = Rig(transforms=(build("transform", "adam"),)).go(1), Rig()
    other.model.to("meta")
    other.chain.load({**rig.chain.state, "gone": {"step": 3}})
    tensors, leaves = checkpoints.flatten(other.chain.state)
    assert (
        {t.device.type for t in tensors.values()} == {"meta"}
        and leaves["low | step"] == 1
        and "gone" not in other.chain.state
    )


def test_clipping_holds_no_second_copy_of_the_gradients():
    rig = Rig(transforms=(clip := build("transform", {"name": "clip", "max_grad_norm": 0.1}),))
    rig.closure()
    grads = {s.name: {k: p.grad for k, p in s.params.items()} for s in rig.chain.param_groups()}
    small = clip.gather(grads)
    assert isinstance(small, LazyGradients) and len(small) == 3
    assert sum(
        float(g.square().sum()) for slots in small.values() for g in slots.values()
    ) ** 0.5 == pytest.approx(0.1, rel=1e-4)


# ------------------------------------------------------------------------------------------ mezo, sam


class Seen(Transform):
    """Keeps what it is given."""

    def __init__(self):
        object.__setattr__(self, "grads", {})

    def apply(self, grads, state, group, step):
        self.grads.update({f"{group.name}.{k}": g.clone() for k, g in grads.items()})
        return grads


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


class Held(TorchDispatchMode):
    """How many bytes of storage, besides what is there already, are held at most."""

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


@pytest.mark.parametrize("tuner", [{"name": "lora", "r": 32}, "full"])
def test_a_run_with_mezo_takes_the_memory_of_inference_and_of_what_moves(base, tmp_path, monkeypatch, tuner):
    """Measured on every step of luthier.tune, on the rows of that step; a run with a backward pass takes
    more.
    """
    found, step = {"mezo": [], "backprop": []}, Trainer.step

    def measured(self):
        roles, clock = self.roles, self.roles.clock
        rows = [dict(r) for r in draw(self.rows, clock, self.batches.per_step)]
        there = (*roles.policy.model.parameters(), *roles.policy.model.buffers())
        with torch.no_grad(), Held(*there) as inference:
            roles.policy.logprobs(roles.batch(rows, training=True))
        with Held(*there) as whole:
            log = step(self)
        moving = [p.nbytes for p in roles.tuner.parameters().values()]
        found[name].append((whole.peak, inference.peak, sum(moving), max(moving)))
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
    for peak, inference, moving, largest in found["mezo"]:
        # three: a direction, its length, and their sum with one tensor
        assert moving <= peak <= inference + moving + 3 * largest
    if tuner != "full":  # whose gradients alone weigh as much as the copy
        assert max(m[0] for m in found["mezo"]) < min(b[0] for b in found["backprop"])


def test_sam_is_the_gradient_at_the_worst_nearby_point():
    rig, plain = Rig(estimator={"name": "sam", "rho": 0.3}, transforms=(seen := Seen(),)), Rig()
    plain.closure()
    own = plain.tuner.parameters()
    norm = sum(p.grad.square().sum() for p in own.values()).sqrt()
    with plain.tuner.using({k: p.detach() + 0.3 * p.grad / norm for k, p in own.items()}):
        plain.closure()
    rig.go(1)
    assert rig.calls == 2 and all(torch.allclose(seen.grads[k], own[k].grad, atol=1e-6) for k in own)


@pytest.mark.parametrize(
    "estimator", [{"name": "sam", "rho": 1e-6}, {"name": "mezo", "eps": 1e-6}], ids=["sam", "mezo"]
)
def test_a_step_aside_that_rounding_swallows_is_refused(estimator):
    rig = Rig(estimator=estimator, dtype=torch.bfloat16)
    before = rig.tuner.tensors()
    with pytest.raises(Refused, match="bfloat16 rounds .*% of this estimator's step aside away"):
        rig.go(1)
    assert all(torch.equal(p, before[k]) for k, p in rig.tuner.parameters().items())
    Rig(estimator=estimator).go(1)


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if find("transform", n).pointwise])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_pointwise_may_go_in_pieces(name, dtype, monkeypatch):
    """Bit for bit what the whole tensor gives, its state and the ages of entries that began anew among it."""

    def trained(piece: int):
        monkeypatch.setattr(_chain, "PIECE", piece)
        rig = Rig([build("transform", name)], dtype=dtype)
        monkeypatch.setattr(
            rig.tuner,
            "extra_grads",
            lambda group: {"weight": 0.1 * rig.model.weight.detach().float()} if group == "weight" else {},
        )
        for _ in range(4):
            rig.tuner.resets = {"weight.weight": rig.model.weight > 0.5}
            rig.go(1)
        return rig

    whole, parts = trained(10**9), trained(9)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    )
    a, b = (checkpoints.flatten(r.chain.state)[0] for r in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(whole.model.weight, Rig([build("transform", name)], dtype=dtype).model.weight)
