"""cofitune: moves the second quarter; soft mask; importance; search finds the planted best."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.subset_tuners import ROWS, base, put, roles_of, train
from luthier.methods.tuners.subset.cofitune import normalised
from luthier.registry import build


def test_cofitune_moves_the_second_quarter():
    names = put("cofitune").names
    assert names == [f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "down")]
    names = put("cofitune", base("gpt2"), layer_range=[0.5, 1.0], modules=["qkv"]).names
    assert names == [f"transformer.h.{i}.attn.c_attn.{k}" for i in (2, 3) for k in ("weight", "bias")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cofitune_soft_mask(kind):
    """I = 0 is the coarse method; I = 1 freezes; a row in between gets its share of the gradient."""
    coarse, fine, frozen, some = (put("cofitune", base(kind), soft_mask=m) for m in (False, True, True, True))
    for k in frozen.keep.values():
        k.zero_()
    start = frozen.tensors()
    train(coarse), train(fine), train(frozen)
    assert all(torch.equal(v, fine.tensors()[k]) for k, v in coarse.tensors().items())
    assert all(torch.equal(v, start[k]) for k, v in frozen.tensors().items())
    name, keep = next(iter(some.keep.items()))
    keep[0] = 0.25
    (
        train(some, 1, transform=None),
        train(coarse := put("cofitune", base(kind), soft_mask=False), 1, transform=None),
    )
    step = lambda a: a.tensors()[f"{name}.weight"] - start[f"{name}.weight"]
    row = (lambda x: x[:, 0]) if kind == "gpt2" else (lambda x: x[0])
    rest = (lambda x: x[:, 1:]) if kind == "gpt2" else (lambda x: x[1:])
    assert torch.allclose(row(step(some)), 0.25 * row(step(coarse)), atol=1e-7) and torch.equal(
        rest(step(some)), rest(step(coarse))
    )


def test_cofitune_importance():
    """A neuron that nothing reads has none; what is normalised lies in [0, 1)."""
    model = base()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] = 0
    attached = put("cofitune", model)
    before = attached.tensors()
    found = attached.importance(ROWS, roles_of(attached))[("model.layers", 1)]
    assert found[0][5].abs() < 1e-9 < found[0].abs().median() and found[1].shape == (32,)
    attached.initialize(ROWS, roles_of(attached))
    keep = attached.keep["model.layers.1.mlp.up_proj.weight"]
    assert torch.allclose(keep, 1 - normalised(found[0]), atol=1e-5) and keep.min() > 0 and keep.max() <= 1
    assert all(torch.equal(v, before[k]) for k, v in attached.tensors().items() if not k.endswith("keep"))
    assert (
        all(p.grad is None for p in model.parameters())
        and not model.model.layers[1].mlp.down_proj._forward_hooks
    )


def test_cofitune_search_finds_the_planted_best():
    """With fewer runs than trying everything."""
    planted = ([0.25, 0.5], ["up", "down"])
    from luthier.recipe.recipe import Recipe

    def score(tuner) -> float:
        where, modules = tuner["layer_range"], tuner["modules"]
        inside = max(0.0, min(where[1], planted[0][1]) - max(where[0], planted[0][0]))
        hit = len(set(modules) & set(planted[1]))
        return inside / 0.25 + hit / 2 - 0.1 * len(modules) - 0.1 * (where[1] - where[0])

    play = build("plan", {"name": "cofitune", "scores": {"accuracy": 1}}).recipes(
        Recipe.load({"model": "m", "data": "d", "tuner": "cofitune"})
    )
    asked, runs = next(play), 0
    with pytest.raises(StopIteration) as end:
        while True:
            runs += len(asked)
            asked = play.send(
                [SimpleNamespace(tuner=r.tuner, after={"accuracy": score(r.tuner)}, folder="") for r in asked]
            )
    best = end.value.value.tuner
    # seven ranges by six sets
    assert (list(best["layer_range"]), list(best["modules"])) == planted and runs < 7 * 6
