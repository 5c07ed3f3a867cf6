"""Toys that estimators, transforms and optimizers step."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from luthier.clock import Clock
from luthier.methods.transforms._base import Transform
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.recipe.schedule import schedule
from luthier.registry import build, names
from luthier.storage import checkpoints
from luthier.train.optimizer import Chain

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


class Seen(Transform):
    """Keeps what it is given."""

    def __init__(self):
        object.__setattr__(self, "grads", {})

    def apply(self, grads, state, group, step):
        self.grads.update({f"{group.name}.{k}": g.clone() for k, g in grads.items()})
        return grads
