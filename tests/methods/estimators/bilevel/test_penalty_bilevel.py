"""Two levels: what is tuned, and what decides how. Closed forms on quadratics, and sources of which one is
noise.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import luthier
from helpers.rows import SUMS
from luthier.clock import Clock
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import build
from luthier.storage import checkpoints, files
from luthier.train.optimizer import Chain


class Vector(nn.Module):
    def __init__(self, n: int, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, dtype=dtype))


class Level:
    """A few terms of one vector under an estimator."""

    def __init__(
        self, terms, estimator, n=5, learning_rate=0.2, chain=("momentum",), start=None, total=100, **settings
    ):
        self.model, self.terms = Vector(n), terms
        if start is not None:
            self.model.weight.data.copy_(start)
        self.tuner = TunedWeights(SimpleNamespace(name="vector"), self.model, lambda name, p: True)
        self.clock = Clock(seed=1, total=total)
        self.chain = Chain([build("transform", c) for c in chain], self.tuner, self.clock, learning_rate)
        self.estimator, self.told = build("estimator", {"name": estimator, **settings}), {}

    def closure(self, grad=True, only=lambda place, name: 1.0):
        y = self.model.weight
        y.grad = None
        values = {n: t(y, self.clock) for n, t in self.terms.items() if only(0, n)}
        loss = sum(only(0, n) * v for n, v in values.items())
        if grad:
            loss.backward()
        self.closure_.values = {n: float(values[n].detach()) if n in values else 0.0 for n in self.terms}
        return float(loss.detach())

    def closure_(self, *args, **kwargs):
        raise NotImplementedError

    def go(self, steps: int):
        def closure(*args, **kwargs):
            return self.closure(*args, **kwargs)

        self.closure_, closure.names, closure.note = closure, list(self.terms), self.told.update
        for _ in range(steps):
            self.estimator.step(closure, self.chain, self.clock)
            self.clock.step += 1
        return self

    @property
    def upper(self) -> dict:
        return next(iter(self.chain.state.values()))["bilevel"]["upper"]


def quadratics(seed: int = 0, n: int = 5, k: int = 3):
    """k convex quadratics of the lower level (H, a), and the point that the upper level likes."""
    rng = torch.Generator().manual_seed(seed)
    H = [torch.randn(n, n, generator=rng, dtype=torch.float64) for _ in range(k)]
    H = [h @ h.T / n + 0.5 * torch.eye(n, dtype=torch.float64) for h in H]
    return (
        H,
        torch.randn(k, n, generator=rng, dtype=torch.float64),
        torch.randn(n, generator=rng, dtype=torch.float64),
    )


@pytest.mark.slow
def test_the_gradient_of_weights_and_decay_is_the_implicit_one_up_to_the_penalty():
    H, a, b = quadratics()
    terms = {
        **{f"s{i}": lambda y, clock, i=i: (y - a[i]) @ H[i] @ (y - a[i]) / 2 for i in range(3)},
        "validation": lambda y, clock: (y - b).square().sum() / 2,
    }
    # closed form at x = 0: F(x) = f(y*), y* = (sum w H + d)^-1 sum w H a, dF/dx = -f'(y*) H^-1 d(g_y)/dx
    d, w = 0.3, torch.full((3,), 1 / 3, dtype=torch.float64)
    whole = sum(w[i] * H[i] for i in range(3)) + d * torch.eye(5, dtype=torch.float64)
    y = torch.linalg.solve(whole, sum(w[i] * H[i] @ a[i] for i in range(3)))
    back = torch.linalg.solve(whole, y - b)
    of_w = torch.stack([-(back @ H[i] @ (y - a[i])) for i in range(3)])
    exact = torch.cat([w * (of_w - (w * of_w).sum()), -(back @ (d * y))[None]])
    errors = []
    for s in (1e-1, 1e-2, 1e-3):
        rig = Level(terms, "penalty_bilevel", penalty=s, upper_learning_rate=0.0, weight_decay=d).go(600)
        found = torch.tensor(
            [rig.upper["hypergradient"][n] for n in ("s0", "s1", "s2", "|decay")], dtype=torch.float64
        )
        errors.append(float((found - exact).norm()))
    assert errors[0] < 0.1 * 3 * float(exact.norm())
    assert 7 < errors[0] / errors[1] < 13 and 7 < errors[1] / errors[2] < 13, errors


def noisy_sources(n: int = 6, rows: int = 32):
    """Regression rows drawn anew each step: clean ones, ones with labels of chance, and clean ones that
    decide.
    """
    truth = torch.linspace(-1, 1, n, dtype=torch.float64)

    def term(noise, name):
        def loss(y, clock):
            rng = clock.rng(name)
            x = torch.randn(rows, n, generator=rng, dtype=torch.float64)
            labels = torch.randn(rows, generator=rng, dtype=torch.float64) if noise else x @ truth
            return (x @ y - labels).square().mean() / 2

        return loss

    return {
        "clean": term(False, "clean"),
        "noise": term(True, "noise"),
        "validation": term(False, "validation"),
    }, truth


@pytest.mark.long
@pytest.mark.parametrize(
    "how",
    [{}, {"inner_steps": 3, "upper_learning_rate": 3.0}, {"momentum": 0.5}, {"final_penalty": 0.02}],
    ids=["single", "double", "storm", "annealed"],
)
def test_the_clean_source_is_found(how):
    terms, truth = noisy_sources()
    settings = {"upper_learning_rate": 1.0, **how}
    rig = Level(terms, "penalty_bilevel", n=6, chain=("adam",), learning_rate=0.02, total=400, **settings).go(
        400
    )
    assert rig.told["mix/clean"] > 0.9 and rig.told["mix/clean"] + rig.told["mix/noise"] == pytest.approx(1)
    even = Level(
        terms, "penalty_bilevel", n=6, chain=("adam",), learning_rate=0.02, total=400, upper_learning_rate=0.0
    ).go(400)
    assert even.told["mix/clean"] == 0.5
    assert (rig.model.weight - truth).norm() < 0.7 * (even.model.weight - truth).norm()


@pytest.mark.long
def test_momentum_makes_the_gradient_of_the_weights_calmer():
    def spread(**how):
        terms, _ = noisy_sources(rows=4)
        rig, seen = (
            Level(terms, "penalty_bilevel", n=6, learning_rate=0.01, upper_learning_rate=0.0, **how).go(200),
            [],
        )
        for _ in range(100):
            seen.append(rig.go(1).upper["hypergradient"]["clean"])
        return float(torch.tensor(seen).std())

    assert spread(momentum=0.1) < 0.6 * spread()


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_it_goes_on_bit_for_bit(momentum, tmp_path):
    def make():
        return Level(
            noisy_sources()[0],
            "penalty_bilevel",
            n=6,
            chain=("adam",),
            learning_rate=0.02,
            momentum=momentum,
            weight_decay=0.1,
        )

    whole, broken = make().go(8), make().go(3)
    made = checkpoints.Checkpoint(broken.tuner.tensors(), broken.chain.state, 3, None, {})
    was, other = checkpoints.load(checkpoints.save(tmp_path, made, 2)), make()
    other.tuner.load(was.tensors)
    other.chain.load(was.state)
    other.clock.step = other.clock.first = 3
    other.go(5)
    assert torch.equal(other.model.weight, whole.model.weight) and other.upper == whole.upper


@pytest.mark.slow
@pytest.mark.long
def test_a_run_learns_its_mixture(base, tmp_path):
    """Sums, sums with answers of chance, and a few sums that decide; the weights are told at each step."""
    wrong = [{**r, "completion": SUMS[(7 * i + 3) % 64]["completion"]} for i, r in enumerate(SUMS)]
    data = [
        {"path": SUMS, "source": "clean"},
        {"path": wrong, "source": "noise"},
        {"path": SUMS[::3], "source": "validation"},
    ]
    change = {
        "data": data,
        "objective": {"name": "by_source", "sources": ["clean", "noise", "validation"]},
        "max_steps": 40,
    }
    change |= {
        "estimator": {"name": "penalty_bilevel", "upper_learning_rate": 1.0},
        "per_device_train_batch_size": 30,
        "learning_rate": 3e-3,
    }
    report = luthier.tune(base | change, folder=tmp_path)
    logged = [line["mix/clean"] for line in files.read_rows(tmp_path / "metrics.jsonl")]
    assert logged[0] == pytest.approx(0.5, abs=0.02) and logged[-1] > 0.55, logged
    assert report.losses[-1] < report.losses[0]


def test_what_cannot_be_weighed_is_refused(base, tmp_path):
    rows = load([{**r, "source": "clean"} for r in SUMS]).rows
    ask = {"estimator": "penalty_bilevel"}
    with pytest.raises(RecipeError, match="at least two others"):
        validate(Recipe.load(base | ask), rows)
    with pytest.raises(RecipeError, match="rows with a `source`"):
        validate(
            Recipe.load(
                base | ask | {"objective": {"name": "by_source", "sources": ["a", "b", "validation"]}}
            ),
            load(SUMS).rows,
        )
    with pytest.raises(RecipeError, match="cannot be split by source"):
        build("objective", {"name": "by_source", "inner": "orpo"})
    with pytest.raises(RecipeError, match="changes which ones are trainable"):
        luthier.tune(
            base
            | ask
            | {
                "objective": {"name": "by_source", "sources": ["clean", "b", "validation"]},
                "data": rows,
                "tuner": {"name": "lisa", "n_layers": 1, "interval": 1},
                "max_steps": 3,
            },
            folder=tmp_path,
        )
