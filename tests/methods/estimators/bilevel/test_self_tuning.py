"""Self-tuning networks: the best response against closed forms, and hyperparameters that move where
validation rows want them.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from torch import nn

import luthier
from helpers import zoo
from helpers.rows import SUMS
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.tuners.low_rank.self_tuning.maths import decay, responses
from luthier.registry import build
from luthier.storage import checkpoints, files
from luthier.train.optimizer import Chain


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
        self.attached = build(
            "tuner", {"name": "self_tuning", "r": 0, "target_modules": ["lin"], **(tuner or {})}
        ).attach(self.model)
        self.rows, self.clock = {"train": train, "validation": valid}, Clock(seed=4, total=total)
        self.chain = Chain(
            [build("transform", "adam")], self.attached, self.clock, rate, lambda step: 1 - step / total
        )
        self.estimator, self.told = build("estimator", {"name": "self_tuning", **settings}), {}

    def loss(self, name):
        x, y = self.rows[name]
        self.attached.announce_rows(
            SimpleNamespace(rows=[{"id": f"{name}-{i}"} for i in range(len(x))]), torch.arange(len(x))
        )
        return (self.model(x) - y).square().mean() / 2

    def go(self, steps):
        def closure(grad=True, only=None):
            torch.default_generator.manual_seed(self.clock.derive_seed("noise"))
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
        self.attached.settle()
        with torch.no_grad():
            return self.model(torch.eye(self.model.lin.get_base_layer().weight.shape[1]))


def regression(rows: int, n: int, noise: float, seed: int):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=rng)
    return x, x @ torch.linspace(-1, 1, n) + noise * torch.randn(rows, generator=rng)


@pytest.mark.long
def test_the_response_is_the_ridge_path():
    """Without dropout, the best response to a weight decay d is (X'X / rows + d)^-1 X'y / rows."""
    x, y = regression(32, 4, 0.3, 1)
    tuner = {"dropout": 1e-6, "weight_decay": 0.3, "sigma": 0.3}
    rig = Rig((x, y), (x, y), total=400, rate=0.05, tuner=tuner, warmup=400, hyper_learning_rate=0.0).go(400)
    for moved in (-0.45, -0.3, 0.0, 0.3, 0.45):  # 1.5 spreads to each side
        d = float(decay(rig.attached.settings, torch.tensor([0.0, moved])))
        exact = torch.linalg.solve(x.T @ x / 32 + d * torch.eye(4), x.T @ y / 32)
        found = rig.at([0.0, moved])
        assert (found - exact).norm() < 0.05 * exact.norm(), (moved, found, exact)
    still = rig.at([0.0, 0.0])
    low, high = (
        torch.linalg.solve(x.T @ x / 32 + d * torch.eye(4), x.T @ y / 32)
        for d in (0.3 * 2.718**-0.45, 0.3 * 2.718**0.45)
    )
    assert (low - still).norm() > 0.05 * low.norm() and (high - still).norm() > 0.05 * high.norm(), (
        "one answer to all would not do"
    )


@pytest.mark.parametrize("r", [0, 3])
def test_without_gates_it_is_the_plain_layer(r):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    rig = Rig((x, x[:, 0]), (x, x[:, 0]), tuner={"r": r})
    p = rig.attached.answers()[0]
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


def stirred(attached):
    """Every tensor of every layer filled, so that the dial matters."""
    rng = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in attached.answers():
            for t in p.parameters():
                t.copy_(0.3 * torch.randn(t.shape, generator=rng))
    return attached


def dials(attached, clock, ids):
    """[2] what each of these rows answers to in this step."""
    return [
        attached.hyper + attached.log_sigma.exp() * torch.randn(2, generator=clock.rng("self_tuning", i))
        for i in ids
    ]


@pytest.mark.parametrize("batch", [zoo.rows(), zoo.deep()], ids=["rows", "deep"])
def test_a_row_has_its_own_noise_in_every_layout(batch):
    """Packed, with shared prompts, padded or alone, a row answers as at one dial for all, set to its own
    draw.
    """
    model, clock, causal = zoo.make("llama"), Clock(seed=1, step=5), build("architecture", "causal")
    attached = stirred(build("tuner", {"name": "self_tuning", "r": 4}).attach(model))
    ids = [row["id"] for row in batch.rows]
    alone = []
    with torch.no_grad():
        for dial in dials(attached, clock, ids):
            [p.dial.copy_(dial) for p in attached.answers()]
            alone.append(causal.forward(model, attached, batch).logprobs)
        attached.settle()
        still = causal.forward(model, attached, batch).logprobs
        of = batch.group[batch.owner]
        want = torch.stack(alone)[of, torch.arange(len(of))]
        for how in (
            causal,
            replace(causal, blocks=False, width=16),
            replace(causal, share_prompts=False),
            replace(causal, packing=False),
        ):
            with attached.answering(clock, dropping=False):
                assert (how.forward(model, attached, batch).logprobs - want).abs().max() < 1e-5
        with attached.answering(clock, dropping=False):
            assert (causal.plain(model, attached, batch) - want).abs().max() < 1e-5
        assert (
            torch.equal(causal.forward(model, attached, batch).logprobs, still)
            and (want - still).abs().max() > 0.1
        )


@pytest.mark.parametrize("kind", ["seq2seq", "masked_lm", "classifier", "reward_model"])
def test_other_networks_know_their_rows(kind):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "pad_token_id": 0,
    }
    model = {
        "seq2seq": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=97,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        "masked_lm": lambda: t.BertForMaskedLM(t.BertConfig(**sizes)),
        "classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**sizes, num_labels=97)),
        "reward_model": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**sizes, num_labels=1)),
    }[kind]().eval()
    attached, clock, how = (
        stirred(build("tuner", {"name": "self_tuning", "r": 4}).attach(model)),
        Clock(seed=2),
        build("architecture", kind),
    )
    batch = zoo.rows()
    with torch.no_grad():
        each = []
        for dial in dials(attached, clock, [row["id"] for row in batch.rows]):
            [p.dial.copy_(dial) for p in attached.answers()]
            each.append(how.plain(model, attached, batch))
        attached.settle()
        of = batch.group[batch.owner]
        want = torch.stack(each)[of, torch.arange(len(of))]
        with attached.answering(clock, dropping=False):
            together, plain = how.forward(model, attached, batch), how.plain(model, attached, batch)
        together = together.values if kind == "reward_model" else together.logprobs
        assert (together - want).abs().max() < 1e-4 and (plain - want).abs().max() < 1e-4
        assert (want - how.plain(model, attached, batch)).abs().max() > 1e-3


def test_the_term_of_the_weight_decay_is_its_mean_over_draws():
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    attached = stirred(
        Rig((x, x[:, 0]), (x, x[:, 0]), tuner={"r": 3, "weight_decay": 0.1, "sigma": 0.4}).attached
    )
    attached.hyper.data.copy_(torch.tensor([0.4, -0.6]))
    p, draws = attached.answers()[0], []
    with torch.no_grad():
        for dial in attached.hyper + attached.log_sigma.exp() * torch.randn(
            3000, 2, generator=torch.Generator().manual_seed(0)
        ):
            p.dial.copy_(dial)
            draws.append(
                float(decay(attached.settings, dial) / 2 * sum(m.square().sum() for m in responses(p)))
            )
        mean, spread = torch.tensor(draws).mean(), torch.tensor(draws).std() / 3000**0.5
        assert abs(float(attached.decaying()) - mean) < 3 * spread and spread < 0.03 * mean


def test_a_module_that_lost_track_of_rows_is_named():
    from luthier.methods.tuners.low_rank.self_tuning.maths import placed

    for shape, dial in (((7, 6), (2, 5, 2)), ((3, 4, 6), (2, 1, 2))):
        with pytest.raises(RecipeError, match="exclude_modules"):
            placed(torch.zeros(dial), torch.zeros(shape))
    assert placed(torch.zeros(2, 5, 2), torch.zeros(10, 6)).shape == (10, 2) and placed(
        torch.zeros(2), torch.zeros(7, 6)
    ).shape == (2,)
    x = torch.randn(5, 6)
    rig = Rig((x, x[:, 0]), (x, x[:, 0]))
    rig.attached.on_rows = lambda *told: None
    with pytest.raises(RecipeError, match="which row a token belongs to"):
        rig.go(1)


@pytest.mark.slow
@pytest.mark.long
def test_dropout_rises_where_labels_are_noisy_and_validation_gets_better():
    train, valid = regression(24, 16, 2.0, 3), regression(40, 16, 0.0, 5)
    how = {
        "total": 500,
        "rate": 0.03,
        "warmup": 150,
        "tuner": {"dropout": 0.05, "weight_decay": 1e-6, "sigma": 0.3},
    }
    rig = Rig(train, valid, hyper_learning_rate=0.04, **how).go(500)
    fixed = Rig(train, valid, hyper_learning_rate=0.0, sigma_learning_rate=0.0, **how).go(500)
    assert fixed.told["dropout"] == pytest.approx(0.05) and rig.told["dropout"] > 0.15, rig.told
    with torch.no_grad():
        assert float(rig.loss("validation")) < 0.8 * float(fixed.loss("validation"))


@pytest.mark.long
def test_a_run_tells_its_hyperparameters_and_goes_on_bit_for_bit(base, tmp_path):
    data = [{"path": SUMS, "source": "train"}, {"path": SUMS[::3], "source": "validation"}]
    change = {
        "tuner": "self_tuning",
        "data": data,
        "objective": "by_source",
        "max_steps": 9,
        "per_device_train_batch_size": 16,
    }
    change |= {
        "estimator": {"name": "self_tuning", "warmup": 0, "hyper_learning_rate": 0.05},
        "save_steps": 3,
    }
    whole = luthier.tune(base | change, folder=tmp_path / "a")
    logged = files.read_rows(tmp_path / "a" / "metrics.jsonl")
    assert [line["dropout"] != pytest.approx(0.1) for line in logged] == [False, False] + [True] * 7
    from luthier.recipe.recipe import Recipe
    from luthier.run.run import perform

    perform(Recipe.load(base | change), tmp_path / "b", stop_at=4)
    again = perform(Recipe.load(base | change), tmp_path / "b")
    assert again.losses == whole.losses
    ends = [checkpoints.load(checkpoints.paths(tmp_path / f)[-1]).tensors for f in "ab"]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0]) and ends[0]["hyper.moved"].any()
    said = [
        luthier.load(tmp_path / f).logprobs([{"id": "0", "prompt": "1+1=", "completions": ["2"]}])
        for f in "ab"
    ]
    assert torch.equal(*said)
    with pytest.raises(RecipeError, match="depend on hyperparameters"):
        luthier.tune(base | change | {"tuner": "lora"}, folder=tmp_path / "c")
