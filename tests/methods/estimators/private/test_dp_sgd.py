"""dp_sgd: clips each row by itself, adds the noise it says, draws rows one by one, and spends what the
accountants of others say; refuses what would void its promise.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import norm

import luthier
from helpers.objectives import batch_of, cast, contract_rows, network
from helpers.optimizers import Rig, same
from helpers.rows import SUMS
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators.private._accountant import composed_epsilon, epsilon, noise_for
from luthier.methods.estimators.private._private import Ledger
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.train.optimizer import Chain
from luthier.train.trainer import BatchSchedule, Trainer

# noise multiplier, sampling rate, steps, delta; epsilon by dp-accounting 0.6: its Rényi accountant, whose
# orders are a list, and its accountant by privacy loss distributions, which is exact
RUNS = [
    (1.1, 256 / 60000, 14062, 1e-5, 2.59656, 2.38169),
    (1.0, 0.01, 1000, 1e-5, 2.10137, 1.82824),
    (0.7, 0.02, 500, 1e-6, 8.77563, 7.74505),
    (4.0, 1.0, 40, 1e-5, 8.07941, 7.51128),
    (2.0, 0.25, 100, 1e-4, 6.21766, 5.58858),
    (0.5, 0.001, 2000, 1e-6, 5.77285, 4.65512),
    (8.0, 0.5, 3000, 1e-6, 23.70394, 21.60642),
]


@pytest.mark.parametrize("noise, rate, steps, delta, renyi, exact", RUNS)
def test_epsilon_is_that_of_other_accountants(noise, rate, steps, delta, renyi, exact):
    """No more than with a list of orders, nearly as much, and never less than what is really spent."""
    ours = epsilon(noise, rate, steps, delta)
    assert exact < ours < renyi * 1.0001
    assert ours > renyi * 0.95


def test_epsilon_of_one_gaussian_is_above_its_closed_form():
    """delta of a Gaussian mechanism at epsilon: Phi(1 / 2s - e s) - exp(e) Phi(-1 / 2s - e s)."""
    for noise in (0.8, 2.0, 10.0):
        e = epsilon(noise, 1.0, 1, 1e-5)
        delta = norm.cdf(0.5 / noise - e * noise) - math.exp(e) * norm.cdf(-0.5 / noise - e * noise)
        assert delta < 1e-5


def test_noise_is_the_inverse_of_epsilon_and_steps_add_up():
    noise = noise_for(3.0, 0.05, 200, 1e-5)
    assert 3.0 * 0.999 < epsilon(noise, 0.05, 200, 1e-5) <= 3.0
    assert composed_epsilon(((1.5, 60), (1.5, 40)), 0.05, 1e-5) == pytest.approx(
        epsilon(1.5, 0.05, 100, 1e-5)
    )
    spent = ((0.9, 100),)
    rest = noise_for(9.0, 0.05, 100, 1e-5, spent)
    assert composed_epsilon((*spent, (rest, 100)), 0.05, 1e-5) <= 9.0
    with pytest.raises(RecipeError, match="cannot be had"):
        noise_for(0.5, 0.05, 100, 1e-5, spent)


def trainer(count=8, per_step=4, steps=1, transforms=(), objective="sft", **settings):
    """A small language model in training, each row with its own micro-batch."""
    torch.manual_seed(3)
    net, others = network(), cast()
    attached = build("tuner", "full").attach(net)
    clock = Clock(seed=5, total=steps)
    roles = Roles(Policy(Causal(), net, attached), clock, others.renderer, **others.players)
    roles.batch = lambda rows, training=False, clock=None: batch_of(rows)
    estimator = build("estimator", {"name": "dp_sgd", **settings})
    schedule = BatchSchedule(per_step, 1, sampler=estimator.draw)
    built = build("objective", objective)
    rows = contract_rows(built, count)
    return Trainer(roles, rows, built, Chain(transforms, attached, clock, 0.1), estimator, schedule)


def row_gradients(run, indices):
    """Gradients and losses of rows, by a backward pass of each."""
    out, losses = [], []
    params = run.roles.tuner.parameters()
    for i in indices:
        for p in params.values():
            p.grad = None
        loss = run.objective.loss(run.roles, batch_of([run.rows[i]])).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        out.append({k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in params.items()})
    return out, losses


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("bound", [0.05, 1e6])
def test_the_update_is_the_sum_of_clipped_row_gradients(clipping, bound):
    """Written out, with hardly any noise; at a large bound it is the mean of the rows' gradients."""
    run = trainer(noise_multiplier=1e-9 / bound, row_grad_norm=bound, clipping=clipping)
    drawn = run.batches.sampler(8, 4, run.roles.clock)
    (grads, losses), before = row_gradients(run, drawn), run.roles.tuner.tensors()
    assert 0 < len(drawn) < 8
    want = {k: torch.zeros_like(v) for k, v in before.items()}
    for own in grads:
        if clipping == "flat":
            whole = torch.linalg.vector_norm(torch.stack([g.norm() for g in own.values()]))
            factors = dict.fromkeys(own, min(1.0, bound / float(whole)))
        else:
            each = bound / len(own) ** 0.5
            factors = {k: min(1.0, each / max(float(g.norm()), 1e-30)) for k, g in own.items()}
        for k, g in own.items():
            want[k] += factors[k] * g / 4  # of the four rows that are expected, not of those drawn
    log = run.step()
    for k, p in run.roles.tuner.tensors().items():
        assert torch.allclose(p, before[k] - 0.1 * want[k], atol=1e-6)
    assert log["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_row_changes_the_sum_by_its_bound_at_most():
    """What the promise rests on: with a row more, the sum moves by row_grad_norm and no further."""
    sums = []
    for count in (7, 8):
        run = trainer(count=8, per_step=8, noise_multiplier=1e-9, row_grad_norm=0.02)
        run.batches.sampler = lambda n, per_step, clock, count=count: list(range(count))
        before = run.roles.tuner.tensors()
        run.step()
        after = run.roles.tuner.tensors()
        sums.append({k: (before[k] - after[k]) * 8 / 0.1 for k in before})
    squares = sum(float((sums[1][k] - sums[0][k]).square().sum()) for k in sums[0])
    assert squares**0.5 == pytest.approx(0.02, rel=1e-2)


def test_noise_has_the_spread_that_is_accounted_for():
    """On every trainable number, also where no row's gradient reaches; independent from step to step."""
    noise, bound = 1.5, 0.2
    run = trainer(steps=3, noise_multiplier=noise, row_grad_norm=bound)
    run.batches.sampler = lambda n, per_step, clock: []  # no row at all: what is left is noise
    draws = []
    for _ in range(3):
        before = run.roles.tuner.tensors()
        run.step()
        run.roles.clock.step += 1
        after = run.roles.tuner.tensors()
        draws.append(torch.cat([((before[k] - after[k]) / 0.1 * 4).flatten() for k in before]))
    for z in draws:
        assert float(z.std()) == pytest.approx(noise * bound, rel=5 / math.sqrt(2 * len(z)))
        assert abs(float(z.mean())) < 5 * noise * bound / math.sqrt(len(z))
        assert bool((z != 0).float().mean() > 0.99)
    correlation = float(torch.corrcoef(torch.stack(draws[:2]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(len(draws[0]))


def test_rows_are_drawn_one_by_one():
    """Each with the same probability and by itself: the counts have a binomial's mean and variance."""
    estimator, clock, steps = build("estimator", "dp_sgd"), Clock(seed=1, total=2000), 2000
    seen, sizes = torch.zeros(20), []
    for clock.step in range(steps):
        drawn = estimator.draw(20, 5, clock)
        seen[drawn] += 1
        sizes.append(float(len(drawn)))
    spread = (0.25 * 0.75 * steps) ** 0.5
    assert bool(((seen - 0.25 * steps).abs() < 5 * spread).all())
    counts = torch.tensor(sizes)
    assert float(counts.mean()) == pytest.approx(5, abs=0.25)
    assert float(counts.var()) == pytest.approx(20 * 0.25 * 0.75, rel=0.2)


def test_draws_and_noise_follow_from_the_secret(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 32), two.write_bytes(b"b" * 32)
    clock = Clock(seed=1, total=4)
    draws = [
        build("estimator", {"name": "dp_sgd", "key_file": str(f)}).draw(64, 32, clock)
        for f in (one, two, one)
    ]
    assert draws[0] == draws[2] != draws[1]
    two.write_bytes(b"short")
    with pytest.raises(RecipeError, match="can be guessed"):
        build("estimator", {"name": "dp_sgd", "key_file": str(two)}).key()


def test_a_longer_run_spends_no_more_than_its_target():
    """The steps that were made at the noise of the short run count."""
    settings = {"name": "dp_sgd", "target_epsilon": 2.0}
    rig = Rig(estimator=settings, total=5).go(5)
    first = Ledger.of(rig.chain).noises()
    assert len(first) == 5 and bool((first == first[0]).all())
    rig.clock.total = 10
    rig.go(1)  # hardly anything is left to spend
    assert float(Ledger.of(rig.chain).noises()[-1]) > 20 * float(first[0])
    rig = Rig(estimator=settings, total=10).go(5)
    rig.clock.total = 20
    rig.go(15)
    assert composed_epsilon(Ledger.of(rig.chain).steps(), 1.0, 1e-5) <= 2.0


@pytest.mark.long
def test_a_run_says_what_it_spends_and_goes_on_bit_for_bit(base, tmp_path):
    change = {
        "data": [dict(row, id=str(i)) for i, row in enumerate(SUMS * 3)],
        "estimator": {"name": "dp_sgd", "target_epsilon": 4.0, "target_delta": 1e-3},
        "optim": {"name": "adamw", "max_grad_norm": 0},
        "max_steps": 6,
        "save_steps": 3,
    }
    whole = luthier.tune(base | change, folder=tmp_path / "whole")
    luthier.tune(base | change, folder=tmp_path / "broken", stop_at=3)
    broken = luthier.tune(base | change, folder=tmp_path / "broken")
    assert whole.losses == broken.losses
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    spent = [entry["epsilon"] for entry in map(json.loads, lines) if "epsilon" in entry]
    assert spent == sorted(spent) and 3.9 < spent[-1] <= 4.0


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"stages": ["drop_prompt"]}, "drop_prompt"),
        ({"load_best_model_at_end": True, "eval_steps": 1, "evaluate": ["loss"]}, "checkpoints"),
        ({"tuner": "lisa"}, "one set of trainable"),
        ({"estimator": {"name": "dp_sgd", "target_delta": 0.9}}, "below 1 /"),
        ({"tuner": {"name": "lora", "r": 2, "init_lora_weights": "eva", "init_rows": 2}}, "starts from rows"),
    ],
)
def test_what_voids_the_promise_is_refused(base, tmp_path, change, sentence):
    recipe = base | {"data": SUMS[:8], "estimator": "dp_sgd", "max_steps": 2} | change
    with pytest.raises(RecipeError, match=sentence):
        luthier.tune(recipe, folder=tmp_path)


def test_objectives_that_compare_rows_are_refused():
    with pytest.raises(RecipeError, match="by itself"):
        build("estimator", "dp_sgd").suits(build("objective", "kto"))


def test_two_rigs_are_the_same():
    make = lambda: Rig(estimator={"name": "dp_sgd", "noise_multiplier": 0.5}).go(4)
    assert same(make(), make())
