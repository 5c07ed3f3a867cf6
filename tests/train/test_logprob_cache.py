"""What a reference says of a row: computed once, the same numbers, read again after a stop, and never where
it could be wrong.
"""

from __future__ import annotations

import json
import signal

import pytest
import torch

import luthier
from helpers import zoo
from helpers.rows import PAIRS
from helpers.runs import KILLED, weights
from luthier.model.policy import Policy
from luthier.registry import build
from luthier.train import logprob_cache

CAUSAL = build("architecture", "causal")


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def known(path, room=1000, what="w", seed=0):
    model = zoo.make("llama", seed=seed)
    off = build("role", "off").play("reference", Policy(CAUSAL, model, build("tuner", "lora").attach(model)))
    made = logprob_cache.open_cache(off, path, room, what)
    assert isinstance(made, logprob_cache.CachedPolicy)
    return made, off


@pytest.mark.parametrize("make", [zoo.rows, zoo.deep])
def test_the_same_numbers(make, tmp_path):
    batch = make()
    role, plain = known(tmp_path / "s.bin")
    want = plain.logprobs(batch)
    batch = batch.view()
    assert torch.equal(role.logprobs(batch), want) and role.cache.slices
    calls = []
    role.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(role.logprobs(batch.view()), want) and not calls  # read
    role.logprobs(batch.view(ids=batch.ids.flip(0)))
    role.logprobs(batch.view(supervised=batch.supervised.flip(0) & (batch.parent[batch.segment] >= 0)))
    assert len(calls) == 2  # other readings and other questions are computed


def test_a_file_is_taken_up_again_and_a_torn_one_only_as_far_as_it_is_whole(tmp_path):
    batch, path = zoo.rows(), tmp_path / "s.bin"
    role, plain = known(path)
    want, first = role.logprobs(batch), len(role.cache.slices)
    role.cache.words.flush()
    again, _ = known(path, seed=1)  # another network: what comes out can only be what was kept
    assert torch.equal(again.logprobs(batch.view()), want)
    last = list(again.cache.slices.values())[-1]
    again.cache.words[last.start] += 1
    torn, _ = known(path)
    assert len(torn.cache.slices) == first - 1 and torch.equal(torn.logprobs(batch.view()), want)
    other, _ = known(path, what="another reference")
    assert not other.cache.slices
    other.cache.close()
    assert not path.exists()


def test_no_room_no_harm(tmp_path):
    batch = zoo.rows()
    role, plain = known(tmp_path / "s.bin", room=12)
    want = plain.logprobs(batch.view())
    assert torch.equal(role.logprobs(batch.view()), want) and torch.equal(role.logprobs(batch.view()), want)
    assert "GB of disk" in logprob_cache.open_cache(plain, tmp_path / "t.bin", 2**40, "")


@pytest.mark.long
@pytest.mark.parametrize("tuner, role", [("full", "start"), ("lora", "off"), ("lora", "model")])
def test_a_run_is_the_same_run(base, tmp_path, tuner, role, tiny):
    roles = {"reference": {"name": "model", "model": tiny} if role == "model" else role}
    base |= {
        "objective": "dpo",
        "data": PAIRS,
        "tuner": tuner,
        "roles": roles,
        "num_train_epochs": 3,
        "max_steps": None,
    }
    plain = luthier.tune(base | {"cache_reference": False}, folder=tmp_path / "a")
    kept = luthier.tune(base, folder=tmp_path / "b")
    assert any("computed once" in n for n in kept.notes) and not any(
        "computed once" in n for n in plain.notes
    )
    once = -(-len(PAIRS) // 4)
    assert kept.losses[:once] == plain.losses[:once] and kept.losses == pytest.approx(plain.losses, abs=1e-5)
    assert not list((tmp_path / "b").glob("logprob_cache-*"))


@pytest.mark.long
def test_killed_and_resumed_is_uninterrupted(base, tmp_path, forks):
    """In the second epoch, between two checkpoints."""
    recipe = base | {
        "objective": "dpo",
        "data": PAIRS[:12],
        "roles": {"reference": "start"},
        "max_steps": 8,
        "save_steps": 3,
    }
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    dead = forks(KILLED, tmp_path, "recipe.json", "broken", "5")
    assert dead.wait() == -signal.SIGKILL, dead.said()
    assert list((tmp_path / "broken").glob("logprob_cache-reference-*"))
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert resumed.losses == whole.losses
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_asked_for_in_vain_is_told(base, tmp_path):
    said = luthier.tune(base | {"cache_reference": True, "max_steps": 1}, folder=tmp_path / "a").notes
    assert any(n.startswith("cache_reference: log-probabilities are not cached") for n in said)
