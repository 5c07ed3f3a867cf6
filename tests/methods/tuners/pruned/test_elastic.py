"""Elastic networks: sub-networks as masks and sliced, what they cost, and what tuning them is good for."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

import luthier
from helpers.architectures import BART
from helpers.elastic import IDS, bert, logits
from helpers.models import make_llama
from helpers.rows import SUMS
from luthier.errors import RecipeError
from luthier.methods.evaluators.cost.pareto.genetic import dominates, fronts, guided, search
from luthier.methods.evaluators.cost.pareto.predictor import gaussian, left_out, linear, onehot, predicted
from luthier.methods.tuners.pruned._elastic import Anatomy, macs, masked, sliced
from luthier.registry import build
from luthier.study.statistics import hypervolume

SHAPE = ((1, 40), (2, 96), (0, 0), (1, 7))


def test_the_largest_sub_network_is_the_network():
    model = make_llama()
    anatomy, before = Anatomy(model, "elastic"), logits(model)
    with masked(model, anatomy, anatomy.whole):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(sliced(model, anatomy, anatomy.whole)), before)


@pytest.mark.parametrize(
    "make, shape",
    [(make_llama, SHAPE), (make_llama, ((2, 96), (1, 20), (2, 1), (0, 0))), (bert, ((2, 30), (4, 11)))],
)
def test_masked_is_sliced(make, shape):
    model = make()
    anatomy, before = Anatomy(model, "elastic"), logits(model)
    small = sliced(model, anatomy, shape)
    with masked(model, anatomy, shape):
        assert (logits(model) - logits(small)).abs().max() < 1e-5
        assert (logits(model) - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("make, shape", [(make_llama, SHAPE), (bert, ((2, 30), (4, 11)))])
def test_multiplications_are_those_that_hooks_count(make, shape):
    model, counted = make(), []
    small = sliced(model, Anatomy(model, "elastic"), shape)
    for m in small.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, x, y: counted.append(y.numel() * x[0].shape[-1]))
    logits(small)
    assert sum(counted) == macs(model, Anatomy(model, "elastic"), shape) * IDS.numel()


def test_what_is_no_sub_network_is_refused():
    for shape in (SHAPE[:2], ((3, 1),) * 4, ((1, 0),) * 4, ((0, 0),) * 4):
        with pytest.raises(RecipeError, match="not a valid sub-network"):
            sliced(make_llama(), Anatomy(make_llama(), "elastic"), shape)
    with pytest.raises(RecipeError, match="no layer can be left out"):
        sliced(bert(), Anatomy(bert(), "elastic"), ((0, 0), (4, 11)))
    with pytest.raises(RecipeError, match=r"depth: \[1.0\]"):
        build("tuner", {"name": "elastic", "depth": [0.5]}).attach(bert())
    seq2seq = BartForConditionalGeneration(BartConfig(**BART))
    with pytest.raises(RecipeError, match="has 2 lists of layers .*encoder.layers, .*decoder.layers"):
        build("tuner", "elastic").attach(seq2seq)
    with pytest.raises(RecipeError, match="layers of equal size"):
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


@pytest.mark.parametrize("kernel", [linear, gaussian])
def test_leaving_one_out_is_a_regression_on_the_others(kernel):
    rng = np.random.default_rng(0)
    X, y = (
        onehot([3, 4, 2], np.stack([rng.integers(n, size=9) for n in (3, 4, 2)], 1)),
        rng.standard_normal(9),
    )
    for i in range(9):
        K, k = kernel(np.delete(X, i, 0), np.delete(X, i, 0)), kernel(X[i : i + 1], np.delete(X, i, 0))[0]
        missed = y[i] - k @ np.linalg.solve(K + 0.3 * np.eye(8), np.delete(y, i))
        assert left_out(kernel(X, X), y, 0.3)[i] == pytest.approx(missed)


def test_what_adds_up_is_predicted_and_so_is_what_does_not():
    rng, choices = np.random.default_rng(0), [4] * 6
    genes = rng.permutation(np.unique(rng.integers(4, size=(120, 6)), axis=0))
    sums = genes @ np.arange(1.0, 7)
    for values in (sums, np.exp(sums / 20) + 2 * (genes[:, 0] == genes[:, 1])):
        guess = predicted(choices, genes[:80].tolist(), values[:80].tolist())
        off = np.array([guess(g) for g in genes[80:]]) - values[80:]
        assert np.sqrt(np.mean(off**2)) < (1e-2 if values is sums else 0.6) * values[80:].std()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_predictions_find_a_better_front_with_no_more_measurements(seed):
    """Eight layers that count unequally: the volume of the front, against NSGA-II on measurements and against
    chance.
    """
    choices, worth, count = [3, 4] * 8, np.random.default_rng(seed).exponential(size=16), [0]
    ends = [tuple(n - 1 for n in choices), (0,) * 16]
    without = lambda g: 1 - (np.array(g) + 1) / np.array(choices)
    macs = lambda g: 16 - float(without(g).sum())

    def cost(g):
        count[0] += 1
        return math.log1p(
            float(worth @ without(g) ** 1.5) + 4 * float(without(g)[1:-1:2] @ without(g)[3::2])
        ), macs(g)

    def guess(known):
        loss = predicted(choices, list(known), [c[0] for c in known.values()])
        return lambda g: (loss(g), macs(g))

    worst = (cost(ends[1])[0] + 0.1, macs(ends[0]) + 0.1)
    volumes, paid = [], []
    for how in ((guided, guess), (search,)):
        count[0], found = 0, how[0](choices, cost, *how[1:], 8, 4, torch.Generator().manual_seed(seed), ends)
        volumes.append(hypervolume(list(found.values()), worst))
        paid.append(count[0])
    rng, drawn = np.random.default_rng(seed), {e: cost(e) for e in ends}
    while len(drawn) < max(paid):
        g = tuple(int(rng.integers(n)) for n in choices)
        drawn[g] = cost(g)
    assert paid[0] <= 2 + 8 * 5 and volumes[0] > 1.1 * max(
        volumes[1], hypervolume(list(drawn.values()), worst)
    )


def small(base, tuner, **more):
    return base | {
        "tuner": tuner,
        "max_steps": 80,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 16,
        "save_steps": 80,
        **more,
    }


@pytest.mark.slow
@pytest.mark.long
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
    rows = [
        {"id": str(i), "prompt": r["prompt"], "completions": [r["completion"]]} for i, r in enumerate(SUMS)
    ]
    half = ((2, 48),) * 4
    losses = {}
    for name in ("elastic", "plain"):
        loaded = luthier.load(tmp_path / name)
        with loaded.roles.tuner.playing(half):
            losses[name] = -float(loaded.logprobs(rows).mean())
    assert losses["elastic"] < 0.8 * losses["plain"], losses
    table = json.loads((tmp_path / "elastic" / "pareto.json").read_text())
    points = [(t["loss"], t["macs"]) for t in table]
    assert report.after["pareto_size"] == len(table) >= 2 and not any(
        dominates(a, b) for a in points for b in points
    )
    shape = tuple(map(tuple, table[0]["shape"]))
    loaded = luthier.load(tmp_path / "elastic")
    loaded.roles.tuner.export(shape, tmp_path / "small")
    loaded.tokenizer.save_pretrained(tmp_path / "small")
    with loaded.roles.tuner.playing(shape):
        masked_said = loaded.logprobs(rows)
    torch.testing.assert_close(
        luthier.load(tmp_path / "small", dtype="float32").logprobs(rows), masked_said, atol=1e-5, rtol=1e-5
    )


@pytest.mark.long
def test_sorting_changes_no_answer_and_puts_the_important_first(base, tmp_path):
    from luthier.model.load import assemble
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import build_methods

    recipe = Recipe.load(base | {"tuner": "elastic"})
    roles = assemble(recipe, build_methods(recipe))
    rows = [
        {"id": str(i), "prompt": r["prompt"], "completions": [r["completion"]]}
        for i, r in enumerate(SUMS[:8])
    ]
    batch = roles.batch(rows)
    layer = roles.policy.model.model.layers[0]
    before, down = roles.policy.logprobs(batch).detach(), layer.mlp.down_proj.weight.detach().clone()
    roles.tuner.initialize(rows, roles)
    torch.testing.assert_close(roles.policy.logprobs(batch.view()).detach(), before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(layer.mlp.down_proj.weight, down)
    with torch.no_grad():
        measure = build("evaluator", {"name": "pareto", "population": 4, "generations": 2, "per_layer": True})
        found = measure.run(roles, rows, tmp_path, "after")
    table = json.loads((tmp_path / "pareto.json").read_text())
    assert found["pareto_size"] == len(table) and any(len(set(map(tuple, t["shape"]))) > 1 for t in table), (
        "layers differ"
    )
    t = next(t for t in table if len(set(map(tuple, t["shape"]))) > 1)
    with roles.tuner.playing(tuple(map(tuple, t["shape"]))):
        assert t["loss"] == pytest.approx(
            -float(roles.policy.logprobs(batch.view()).detach().mean()), abs=1e-4
        ), "measured, not predicted"
    with roles.tuner.playing(((2, 48),) * 4):
        first = roles.policy.logprobs(batch.view()).detach()
        with roles.tuner.whole():
            torch.testing.assert_close(
                roles.policy.logprobs(batch.view()).detach(), before, atol=1e-4, rtol=1e-4
            )
    assert not torch.allclose(first, before, atol=1e-2)
