"""Runs side by side on one base end as they would alone."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers import zoo
from helpers.rows import PAIRS, SUMS
from helpers.runs import near, weights
from luthier.model.policy import Policy
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.run import batched
from luthier.train.batched_forward import joint_outputs, share_weights, why_not_joined
from luthier.train.batched_lora import BatchedTrainer

CAUSAL = build("architecture", "causal")


MEMBERS = {
    "small": {"tuner": {"name": "lora", "r": 2}, "seed": 0},
    "wide": {"tuner": {"name": "lora", "r": 8, "lora_alpha": 4}, "learning_rate": 3e-3, "seed": 1},
    "queries": {
        "tuner": {"name": "lora", "target_modules": ["q_proj", "down_proj"]},
        "lr_scheduler_type": "constant",
        "seed": 0,
    },
}


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def crew(name="llama"):
    base = zoo.make(name)
    return [
        Policy(CAUSAL, model, build("tuner", m["tuner"]).attach(model))
        for m in MEMBERS.values()
        for model in [share_weights(base)]
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gemma3"])
def test_one_pass_says_what_each_says_alone(name):
    """Log-probabilities and gradients, on batches of unlike size and shape; and no member hears of
    another.
    """
    policies, batches = crew(name), [zoo.rows(), zoo.deep(), zoo.rows()]
    for p in policies:
        for k, slot in enumerate(p.attached.parameters().values()):
            torch.nn.init.normal_(slot, std=0.1, generator=torch.Generator().manual_seed(k))
    assert why_not_joined(policies) is None
    said = [o.logprobs for o in joint_outputs(policies, batches)]
    want = [p.logprobs(b.view()) for p, b in zip(policies, batches, strict=True)]
    moving = [list(p.attached.parameters().values()) for p in policies]
    got = torch.autograd.grad(sum(x.sin().sum() for x in said), [t for m in moving for t in m])
    alone = [g for x, m in zip(want, moving, strict=True) for g in torch.autograd.grad(x.sin().sum(), m)]
    for a, b in zip([*said, *got], [*want, *alone], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(policies[0].logprobs(batches[0].view()), want[0])  # the network is as it was


def test_what_cannot_be_read_in_one_pass():
    policies = crew()
    other = zoo.make("llama")
    stranger = Policy(CAUSAL, other, build("tuner", "lora").attach(other))
    dora = share_weights(other)
    full = zoo.make("llama")
    for crowd, why in (
        ([*policies, stranger], "share weights"),
        ([Policy(CAUSAL, dora, build("tuner", {"name": "lora", "use_dora": True}).attach(dora))], "A and B"),
        ([Policy(CAUSAL, full, build("tuner", "full").attach(full))], "more than LoRA"),
    ):
        assert why in str(why_not_joined(crowd))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("objective, data", [("sft", SUMS), ("dpo", PAIRS)])
@pytest.mark.parametrize("way", [True, False])
def test_each_ends_as_its_own_run(base, tmp_path, monkeypatch, objective, data, way):
    """In one pass and one after the other; over epochs, with accumulation, a shared reference and a shared
    store.
    """
    monkeypatch.setattr(BatchedTrainer, "prefers_joint", lambda self: way)
    base |= {
        "objective": objective,
        "data": data[:12],
        "max_steps": 8,
        "evaluate": ["loss"],
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    recipes = {k: Recipe.load({**base, **m}) for k, m in MEMBERS.items()}
    assert (
        len({batched.shared_key(r) for r in recipes.values()}) == 1
        and batched.shared_key(Recipe.load(base)) is None
    )
    reports = batched.perform([(r, tmp_path / "fleet" / k) for k, r in recipes.items()])
    for (name, recipe), got in zip(recipes.items(), reports, strict=True):
        want = luthier.tune(recipe, folder=tmp_path / name)
        assert got.losses == pytest.approx(want.losses, abs=1e-5) and got.after == pytest.approx(
            want.after, abs=1e-5
        )
        assert near(weights(tmp_path / "fleet" / name), weights(tmp_path / name), 2e-5)
        assert (got.stats["tokens"], got.stats["rows_seen"]) == (
            want.stats["tokens"],
            want.stats["rows_seen"],
        )
    assert not list((tmp_path / "fleet").glob("*/logprob_cache-*"))


@pytest.mark.long
def test_paused_and_killed_ones_go_on(base, tmp_path):
    """One member is ahead of the others: they catch up first."""
    base |= {"max_steps": 8, "save_steps": 2}
    runs = [(Recipe.load({**base, **m}), tmp_path / k) for k, m in MEMBERS.items()]
    from luthier.run.run import perform

    perform(runs[1][0], runs[1][1], stop_at=4)
    paused = batched.perform(runs, stop_at=0.75)
    assert [r.stats["paused_at"] for r in paused] == [6, 6, 6]
    for (recipe, folder), got in zip(runs, batched.perform(runs), strict=True):
        assert got.losses == pytest.approx(
            luthier.tune(recipe, folder=tmp_path / "alone" / folder.name).losses, abs=1e-5
        )
    # finished: nothing to do
    assert [r.losses for r in batched.perform(runs)] == [luthier.Report.read(f).losses for _, f in runs]


@pytest.mark.long
def test_the_faster_way_is_measured_and_told(base, tmp_path):
    runs = [(Recipe.load({**base, **m, "max_steps": 7}), tmp_path / k) for k, m in MEMBERS.items()]
    notes = batched.perform(runs)[0].notes
    assert any("3 runs train" in n and "µs per token" in n for n in notes)
