"""Elastic networks: sub-networks as masks and sliced, what they cost, and what tuning them is good for."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from torch import nn

import luthier
from conftest import SUMS, make_llama
from luthier.evaluators._pareto import dominates, fronts, search
from luthier.method import RecipeError, build
from luthier.tuners._elastic import Anatomy, macs, masked, sliced
from zoo import BERT

IDS = torch.arange(6, 26).reshape(2, 10)
SHAPE = ((1, 40), (2, 96), (0, 0), (1, 7))


def bert():
    import transformers as t

    torch.manual_seed(0)
    return t.BertForMaskedLM(t.BertConfig(**BERT)).eval()


@torch.no_grad()
def said(model):
    return model(IDS % 90, attention_mask=torch.ones_like(IDS)).logits


def test_the_largest_sub_network_is_the_network():
    model = make_llama()
    anatomy, before = Anatomy(model), said(model)
    with masked(model, anatomy, anatomy.whole):
        assert torch.equal(said(model), before)
    assert torch.equal(said(sliced(model, anatomy, anatomy.whole)), before)


@pytest.mark.parametrize("make, shape", [(make_llama, SHAPE), (make_llama, ((2, 96), (1, 20), (2, 1), (0, 0))), (bert, ((2, 30), (4, 11)))])
def test_masked_is_sliced(make, shape):
    model = make()
    anatomy, before = Anatomy(model), said(model)
    small = sliced(model, anatomy, shape)
    with masked(model, anatomy, shape):
        assert (said(model) - said(small)).abs().max() < 1e-5
        assert (said(model) - before).abs().max() > 1e-3
    assert torch.equal(said(model), before)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("make, shape", [(make_llama, SHAPE), (bert, ((2, 30), (4, 11)))])
def test_multiplications_are_those_that_hooks_count(make, shape):
    model, counted = make(), []
    small = sliced(model, Anatomy(model), shape)
    for m in small.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, x, y: counted.append(y.numel() * x[0].shape[-1]))
    said(small)
    assert sum(counted) == macs(model, Anatomy(model), shape) * IDS.numel()


def test_what_is_no_sub_network_is_refused():
    for shape in (SHAPE[:2], ((3, 1),) * 4, ((1, 0),) * 4, ((0, 0),) * 4):
        with pytest.raises(RecipeError, match="no sub-network"):
            sliced(make_llama(), Anatomy(make_llama()), shape)
    with pytest.raises(RecipeError, match="none of its layers can be left out"):
        sliced(bert(), Anatomy(bert()), ((0, 0), (4, 11)))
    with pytest.raises(RecipeError, match=r"depth: \[1.0\]"):
        build("tuner", {"name": "elastic", "depth": [0.5]}).attach(bert())
    with pytest.raises(RecipeError, match="layers of one size"):
        build("tuner", "elastic").attach(make_llama()).export(SHAPE, "nowhere")


def test_the_front_holds_nobody_that_another_beats():
    costs = [(1, 5), (2, 2), (5, 1), (3, 3), (2, 2), (6, 6)]
    assert fronts(costs) == [[0, 1, 2, 4], [3], [5]]

    def goal(g):
        return float(sum((x - 2) ** 2 for x in g)), float(sum((i + 1) * x for i, x in enumerate(g)))

    every = [goal(g) for g in product(range(4), repeat=4)]
    true = {every[i] for i in fronts(every)[0]}
    found = search([4] * 4, goal, 24, 14, torch.Generator().manual_seed(0), [(0,) * 4])
    assert not any(dominates(a, b) for a in found.values() for b in found.values())
    assert len(set(found.values()) & true) >= 0.9 * len(true) and len(true) > 8


def small(base, tuner, **more):
    return base | {"tuner": tuner, "max_steps": 80, "learning_rate": 2e-3, "per_device_train_batch_size": 16, "save_steps": 80, **more}


def test_half_the_width_is_better_after_elastic_tuning_and_the_best_parts_are_kept(base, tmp_path):
    how = {
        "objective": "sft + kl",
        "roles": {"reference": "whole"},
        "estimator": "elastic",
        "evaluate": [{"name": "pareto", "generations": 2, "population": 6, "n": 32}],
    }
    tuner = {"name": "elastic", "heads": [1.0], "width": [0.5, 1.0], "depth": [0.75, 1.0]}
    report = luthier.tune(small(base, tuner, **how), folder=tmp_path / "elastic")
    luthier.tune(small(base, tuner), folder=tmp_path / "plain")
    rows = [{"id": str(i), "prompt": r["prompt"], "completions": [r["completion"]]} for i, r in enumerate(SUMS)]
    half = ((2, 48),) * 4
    losses = {}
    for name in ("elastic", "plain"):
        loaded = luthier.load(tmp_path / name)
        with loaded.roles.tuner.playing(half):
            losses[name] = -float(loaded.logprobs(rows).mean())
    assert losses["elastic"] < 0.8 * losses["plain"], losses
    table = json.loads((tmp_path / "elastic" / "pareto.json").read_text())
    points = [(t["loss"], t["macs"]) for t in table]
    assert report.after["pareto_size"] == len(table) >= 2 and not any(dominates(a, b) for a in points for b in points)
    shape = tuple(map(tuple, table[0]["shape"]))
    loaded = luthier.load(tmp_path / "elastic")
    loaded.roles.tuner.export(shape, tmp_path / "small")
    loaded.tokenizer.save_pretrained(tmp_path / "small")
    with loaded.roles.tuner.playing(shape):
        masked_said = loaded.logprobs(rows)
    torch.testing.assert_close(luthier.load(tmp_path / "small", dtype="float32").logprobs(rows), masked_said, atol=1e-5, rtol=1e-5)


def test_sorting_changes_no_answer_and_puts_the_important_first(base, tmp_path):
    from luthier.assembly import assemble
    from luthier.recipe import Recipe
    from luthier.rehearsal import parts

    recipe = Recipe.load(base | {"tuner": "elastic"})
    roles = assemble(recipe, parts(recipe))
    rows = [{"id": str(i), "prompt": r["prompt"], "completions": [r["completion"]]} for i, r in enumerate(SUMS[:8])]
    batch = roles.batch(rows)
    layer = roles.policy.model.model.layers[0]
    before, down = roles.policy.logprobs(batch).detach(), layer.mlp.down_proj.weight.detach().clone()
    roles.tuner.initialize(rows, roles)
    torch.testing.assert_close(roles.policy.logprobs(batch.view()).detach(), before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(layer.mlp.down_proj.weight, down)
    with roles.tuner.playing(((2, 48),) * 4):
        first = roles.policy.logprobs(batch.view()).detach()
        with roles.tuner.whole():
            torch.testing.assert_close(roles.policy.logprobs(batch.view()).detach(), before, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, before, atol=1e-2)
