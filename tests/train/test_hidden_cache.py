"""Layers below all that moves: computed once, the same numbers, and never where they could be wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import luthier
from helpers import zoo
from helpers.rows import PAIRS, SUMS
from luthier.model.batch import collate
from luthier.model.policy import Policy
from luthier.registry import build
from luthier.train import hidden_cache

CAUSAL = build("architecture", "causal")


TOP = {"name": "lora", "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}


def on_top(name="llama", tuner=TOP):
    model = zoo.make(name)
    return Policy(CAUSAL, model, build("tuner", tuner).attach(model))


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gemma3", "mixtral"])
@pytest.mark.parametrize("make", [zoo.rows, zoo.deep])
def test_the_same_numbers_and_gradients(name, make, tmp_path):
    policy, batch = on_top(name), make()
    model, attached = policy.model, policy.attached
    for p in attached.parameters().values():
        torch.nn.init.normal_(p, std=0.1)
    kept = hidden_cache.open_cache(policy, batch, tmp_path / "f.bin", 1000)
    assert (
        isinstance(kept, hidden_cache.HiddenStateCache)
        and kept.first == 1
        and 0 < kept.used <= len(batch.ids)
    )

    def asked():
        out = CAUSAL.forward(model, attached, batch).logprobs
        return [out, *torch.autograd.grad(out.sin().sum(), list(attached.parameters().values()))]

    want = asked()
    attached.hidden_cache, lower, calls = kept, model.get_decoder().layers[0].self_attn, []
    lower.register_forward_hook(lambda *_: calls.append(1))
    got = asked()
    assert not calls  # the lower layer rests
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    CAUSAL.forward(model, attached, batch.view(ids=batch.ids.flip(0)))
    assert calls  # another reading is computed
    kept.close()
    assert not (tmp_path / "f.bin").exists()


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gemma3"])
def test_what_rows_begin_with_is_read_once_for_the_run(name, tmp_path):
    """Lower layers look back at its keys and values: the same states, neither read nor stored again."""
    policy = on_top(name)
    model, attached = policy.model, policy.attached
    beginning = zoo.tokens(9, 70)
    rows = []
    for k in range(3):
        completions = [zoo.tokens(3, 80 + k), zoo.tokens(2, 90 + k)]
        rows.append((beginning + zoo.tokens(k, 60 + k), completions))
    rows.append((zoo.tokens(5, 71), [zoo.tokens(2, 72)]))  # another one
    batch = collate_rows(rows)
    apart = hidden_cache.open_cache(policy, batch, tmp_path / "a.bin", 1000)
    shared = hidden_cache.open_cache(policy, batch, tmp_path / "b.bin", 1000, beginning)
    want = apart.states(CAUSAL, model, attached, batch, fill=True)
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, x, y: read.append(x[0].numel()))
    assert shared.used == apart.used - (0 if name == "gemma3" else 3 * len(beginning))
    torch.testing.assert_close(shared.states(CAUSAL, model, attached, batch, fill=True), want)
    more = collate_rows([(beginning + [5], [[6, 7]])])
    torch.testing.assert_close(
        shared.states(CAUSAL, model, attached, more, fill=True),
        apart.states(CAUSAL, model, attached, more, fill=True),
        atol=1e-5,
        rtol=1e-5,
    )
    assert read == [12 if name == "gemma3" else 3, 12]  # a sliding window forgets the beginning
    assert not any(hasattr(module, "trunk") for module in model.modules())


def collate_rows(rows):
    encoded = []
    for i, (prompt, completions) in enumerate(rows):
        marks = [[True] * len(c) for c in completions]
        row = SimpleNamespace(prompt=prompt, completions=completions, supervised=marks)
        encoded.append({"id": str(i), "e": row})
    return collate(encoded, lambda row: row["e"])


def test_no_room_no_harm(tmp_path):
    policy, batch = on_top(), zoo.rows()
    kept = hidden_cache.open_cache(policy, batch, tmp_path / "f.bin", 12)
    want = CAUSAL.forward(policy.model, policy.attached, batch).logprobs
    policy.attached.hidden_cache = kept
    policy.model.train()
    assert (
        torch.equal(CAUSAL.forward(policy.model, policy.attached, batch).logprobs, want) and kept.used <= 12
    )


@pytest.mark.parametrize(
    "tuner, why",
    [
        ({"name": "lora", "target_modules": ["q_proj"]}, "lowest layer"),
        ("full", "lowest layer"),
        ("lisa", "lowest layer"),
        ({"name": "prompt"}, "changes at every step"),
    ],
)
def test_where_something_below_moves_nothing_is_kept(tuner, why, tmp_path):
    assert why in hidden_cache.open_cache(on_top(tuner=tuner), zoo.rows(), tmp_path / "f.bin", 1000)


def test_dropout_below(tmp_path):
    policy = on_top()
    policy.model.config.attention_dropout = 0.1
    assert "dropout" in hidden_cache.open_cache(policy, zoo.rows(), tmp_path / "f.bin", 1000)
    noisy = Policy(replace(CAUSAL, neftune_noise_alpha=5.0), policy.model, policy.attached)
    assert "changes at every step" in hidden_cache.open_cache(noisy, zoo.rows(), tmp_path / "f.bin", 1000)


@pytest.mark.long
@pytest.mark.parametrize("objective, data", [("sft", SUMS), ("dpo", PAIRS)])
def test_a_run_is_the_same_run(base, tmp_path, objective, data):
    """Over epochs, with the reference reading the same rows; and the file is gone at the end."""
    tuner = {"name": "lora", "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}
    base |= {
        "objective": objective,
        "data": data,
        "tuner": tuner,
        "num_train_epochs": 3,
        "max_steps": None,
        "evaluate": ["loss"],
    }
    plain = luthier.tune(base | {"cache_frozen": False}, folder=tmp_path / "a")
    kept = luthier.tune(base, folder=tmp_path / "b")
    assert any("are frozen" in n for n in kept.notes) and not any("are frozen" in n for n in plain.notes)
    assert kept.losses == pytest.approx(plain.losses, abs=1e-5)
    assert not list((tmp_path / "b").glob("hidden_cache-*"))
