"""Self-tuning networks: the best response against closed forms, and hyperparameters that move where validation rows want them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import luthier
from conftest import SUMS
from luthier import store
from luthier.clock import Clock
from luthier.method import RecipeError, build
from luthier.transforms._chain import Chain
from luthier.tuners.self_tuning import decay


class Line(nn.Module):
    """y = x w: its weight is 0, so that the adapter is all of it."""

    def __init__(self, n: int):
        super().__init__()
        self.lin = nn.Linear(n, 1, bias=False)
        nn.init.zeros_(self.lin.weight)
        self.config = {"model_type": "none"}

    def forward(self, x):
        return self.lin(x)[:, 0]


class Rig:
    def __init__(self, train, valid, rate=0.02, total=1000, tuner=None, **settings):
        torch.manual_seed(0)
        self.model = Line(train[0].shape[1])
        self.attached = build("tuner", {"name": "self_tuning", "r": 0, "target_modules": ["lin"], **(tuner or {})}).attach(self.model)
        self.rows, self.clock = {"train": train, "validation": valid}, Clock(seed=4, total=total)
        self.chain = Chain([build("transform", "adam")], self.attached, self.clock, rate, lambda step: 1 - step / total)
        self.estimator, self.told = build("estimator", {"name": "self_tuning", **settings}), {}

    def loss(self, name):
        x, y = self.rows[name]
        return (self.model(x) - y).square().mean() / 2

    def go(self, steps):
        def closure(grad=True, only=None):
            torch.manual_seed(self.clock.fold("noise"))
            for p in self.attached.parameters().values():
                p.grad = None
            value = self.loss("train" if only and only(0, "train") else "validation")
            value.backward()
            return float(value.detach())

        closure.note = self.told.update
        for _ in range(steps):
            self.estimator.step(closure, self.chain, self.clock)
            self.clock.step += 1
        return self

    def at(self, moved) -> torch.Tensor:
        """[n] the weights with which the network answers to hyperparameters."""
        self.attached.hyper.data.copy_(torch.tensor(moved))
        with self.attached.answering(dropping=False), torch.no_grad():
            return self.model(torch.eye(self.model.lin.get_base_layer().weight.shape[1]))


def regression(rows: int, n: int, noise: float, seed: int):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=rng)
    return x, x @ torch.linspace(-1, 1, n) + noise * torch.randn(rows, generator=rng)


def test_the_response_is_the_ridge_path():
    """Without dropout, the best response to a weight decay d is (X'X / rows + d)^-1 X'y / rows."""
    x, y = regression(64, 4, 0.3, 1)
    tuner = {"dropout": 1e-6, "weight_decay": 0.3, "sigma": 0.3}
    rig = Rig((x, y), (x, y), total=4000, rate=0.01, tuner=tuner, warmup=4000, hyper_learning_rate=0.0).go(4000)
    for moved in (-0.45, -0.3, 0.0, 0.3, 0.45):  # 1.5 spreads to each side
        d = float(decay(rig.attached.settings, torch.tensor([0.0, moved])))
        exact = torch.linalg.solve(x.T @ x / 64 + d * torch.eye(4), x.T @ y / 64)
        found = rig.at([0.0, moved])
        assert (found - exact).norm() < 0.05 * exact.norm(), (moved, found, exact)
    still = rig.at([0.0, 0.0])
    low, high = (torch.linalg.solve(x.T @ x / 64 + d * torch.eye(4), x.T @ y / 64) for d in (0.3 * 2.718**-0.45, 0.3 * 2.718**0.45))
    assert (low - still).norm() > 0.05 * low.norm() and (high - still).norm() > 0.05 * high.norm(), "one answer to all would not do"


@pytest.mark.parametrize("r", [0, 3])
def test_without_gates_it_is_the_plain_layer(r):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    rig = Rig((x, x[:, 0]), (x, x[:, 0]), tuner={"r": r})
    p = rig.attached.held()[0]
    with torch.no_grad():
        for name, t in p.named_parameters():
            t.normal_(generator=torch.Generator().manual_seed(len(name)))
            if name.startswith("V_"):
                t.zero_()
        plain = x @ (p.D if r == 0 else p.B @ p.A * (16 / r)).T
        assert (rig.model(x) - plain[:, 0]).abs().max() < 1e-6 * plain.abs().max()
        assert torch.equal(rig.at([1.3, -2.0]), rig.at([0.0, 0.0]))
        next(t for n, t in p.named_parameters() if n.startswith("V_")).fill_(1.0)
        assert not torch.allclose(rig.at([1.3, -2.0]), rig.at([0.0, 0.0]))


def test_dropout_rises_where_labels_are_noisy_and_validation_gets_better():
    train, valid = regression(24, 16, 2.0, 3), regression(400, 16, 0.0, 5)
    tuner = {"dropout": 0.05, "weight_decay": 1e-6, "sigma": 0.3}
    rig = Rig(train, valid, total=3000, tuner=tuner, hyper_learning_rate=0.01, warmup=300).go(3000)
    fixed = Rig(train, valid, total=3000, tuner=tuner, hyper_learning_rate=0.0, sigma_learning_rate=0.0, warmup=300).go(3000)
    assert fixed.told["dropout"] == pytest.approx(0.05) and rig.told["dropout"] > 0.15, rig.told
    with torch.no_grad():
        assert float(rig.loss("validation")) < 0.8 * float(fixed.loss("validation"))


def test_a_run_tells_its_hyperparameters_and_goes_on_bit_for_bit(base, tmp_path):
    data = [{"path": SUMS, "source": "train"}, {"path": SUMS[::3], "source": "validation"}]
    change = {"tuner": "self_tuning", "data": data, "objective": "by_source", "max_steps": 9, "per_device_train_batch_size": 16}
    change |= {"estimator": {"name": "self_tuning", "warmup": 0, "hyper_learning_rate": 0.05}, "save_steps": 3}
    whole = luthier.tune(base | change, folder=tmp_path / "a")
    logged = store.read_rows(tmp_path / "a" / "metrics.jsonl")
    assert [line["dropout"] != pytest.approx(0.1) for line in logged] == [False, False] + [True] * 7
    from luthier.recipe import Recipe
    from luthier.run import perform

    perform(Recipe.load(base | change), tmp_path / "b", until=4)
    again = perform(Recipe.load(base | change), tmp_path / "b")
    assert again.losses == whole.losses
    ends = [store.load_checkpoint(store.checkpoints(tmp_path / f)[-1]).tensors for f in "ab"]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0]) and ends[0]["hyper.moved"].any()
    said = [luthier.load(tmp_path / f).logprobs([{"id": "0", "prompt": "1+1=", "completions": ["2"]}]) for f in "ab"]
    assert torch.equal(*said)
    with pytest.raises(RecipeError, match="answers to hyperparameters"):
        luthier.tune(base | change | {"tuner": "lora"}, folder=tmp_path / "c")
