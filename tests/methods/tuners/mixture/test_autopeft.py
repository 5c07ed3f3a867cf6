"""AutoPEFT: what a vector counts and is made of, the vector of zeros, and a search over vectors that moves to
another task.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import luthier
from helpers.rows import SUMS
from helpers.tuners import SHAPES, _shaped, asked, base
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.searchers._base import Observation
from luthier.methods.searchers.model_based import _acquire
from luthier.methods.tuners._base import Untuned
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.study.search import search_spec
from luthier.study.space import parse_space
from luthier.study.statistics import hypervolume

VECTORS = [
    dict(serial=4, parallel=2, num_virtual_tokens=3),
    dict(serial=0, parallel=8, num_virtual_tokens=1, insert=[0, 1]),
    dict(serial=1, parallel=0, num_virtual_tokens=0, insert=[1, 0]),
    dict(serial=0, parallel=0, num_virtual_tokens=2),
]


ZERO = [dict(serial=0, parallel=0, num_virtual_tokens=0), dict(insert=[0, 0])]


def vector(**settings):
    torch.manual_seed(1)
    return build("tuner", {"name": "autopeft", **settings})


def moving(attached) -> int:
    return sum(p.numel() for p in attached.parameters().values())


def says(attached) -> torch.Tensor:
    with torch.no_grad():
        return asked(attached.model, attached)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", *SHAPES])
@pytest.mark.parametrize("settings", VECTORS)
def test_what_moves_is_what_the_vector_says(kind, settings):
    model = base() if kind == "llama" else copy.deepcopy(_shaped(kind))
    said, attached = vector(**settings).numbers(model), vector(**settings).attach(model)
    assert said == moving(attached) > 0
    flags = settings.get("insert", [1, 1])
    assert {i for i in (0, 1) if any(f".{i}." in s.name for s in attached.param_groups())} == {
        i for i in (0, 1) if flags[i]
    }


def test_numbers_by_hand():
    """A Llama 32 wide, 64 within, keys 16 wide, two layers."""
    serial, parallel, prefix = 4 * (32 + 32 + 1) + 32, 2 * (64 + 32 + 1) + 32, 3 * 2 * 16
    assert vector(**VECTORS[0]).numbers(base()) == 2 * (serial + parallel + prefix)
    assert vector(**VECTORS[2]).numbers(base()) == 1 * (32 + 32 + 1) + 32


@pytest.mark.parametrize("settings", ZERO)
def test_zeros_are_the_frozen_model(settings, tiny):
    attached = vector(**settings).attach(base())
    assert not attached.param_groups() and vector(**settings).numbers(base()) == 0
    assert not any(p.requires_grad for p in attached.model.parameters())
    assert torch.equal(says(attached), says(Untuned(base())))
    settings = {k: v * 2 if k == "insert" else v for k, v in settings.items()}  # four layers
    with pytest.raises(RecipeError, match="tuner 'autopeft' has no trainable parameters"):
        luthier.tune(model=tiny, data=SUMS, tuner={"name": "autopeft", **settings}, max_steps=1)


@pytest.mark.parametrize(
    ("settings", "other", "prefix"),
    [
        (
            dict(serial=4, parallel=0, num_virtual_tokens=0),
            {"name": "pfeiffer", "reduction_factor": 8},
            "serial_",
        ),
        (
            dict(serial=0, parallel=8, num_virtual_tokens=0),
            {"name": "parallel_adapter", "reduction_factor": 8, "target_modules": ["down_proj"]},
            "parallel_",
        ),
        (dict(serial=0, parallel=0, num_virtual_tokens=4), {"name": "prefix", "num_virtual_tokens": 4}, ""),
    ],
)
def test_each_kind_alone_is_the_tuner_of_its_name(settings, other, prefix):
    mine, theirs = vector(**settings).attach(base()), build("tuner", other).attach(base())
    own = {k.replace(prefix, "") if prefix else k: p for k, p in mine.parameters().items()}
    assert own.keys() == theirs.parameters().keys()
    with torch.no_grad():
        for k, p in theirs.parameters().items():
            own[k].copy_(p.normal_(std=0.3))
    assert torch.allclose(says(mine), says(theirs), atol=1e-6)
    assert not torch.allclose(says(mine), says(Untuned(base())), atol=1e-3)


def test_both_adapters_add_up_and_start_as_the_base():
    """What the serial one makes of what the matrix says, and the parallel one of what it reads; up at zero,
    nothing.
    """
    attached = vector(serial=4, parallel=2, num_virtual_tokens=0).attach(base())
    assert torch.equal(says(attached), says(Untuned(base())))
    layer = attached.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=0.3)
        x = torch.randn(5, 64)
        y, p = layer.base_layer(x), layer.tensors("default")
        serial = torch.relu(y @ p.serial_down.T + p.serial_down_bias) @ p.serial_up.T + p.serial_up_bias
        parallel = (
            torch.relu(x @ p.parallel_down.T + p.parallel_down_bias) @ p.parallel_up.T + p.parallel_up_bias
        )
        torch.testing.assert_close(layer(x), y + serial + parallel)


@pytest.mark.parametrize(
    ("settings", "kind", "why"),
    [
        (dict(insert=[1, 0, 1]), "llama", "insert has 3 flags, but LlamaForCausalLM has 2 layers"),
        (dict(serial=4, parallel=0), "mixtral", "MixtralForCausalLM has no module for serial"),
        (dict(insert=[1, 2]), "llama", "insert"),
    ],
)
def test_what_cannot_be_is_refused(settings, kind, why):
    with pytest.raises(RecipeError, match=why):
        vector(**settings).attach(base(kind))


pytest.importorskip("optuna")


@pytest.fixture
def shared(tiny) -> dict:
    return {
        "model": tiny,
        "data": SUMS,
        "dtype": "float32",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "eval_data": 0.3,
        "tuner": {"name": "autopeft", "serial": 8, "parallel": 16, "num_virtual_tokens": 2},
        "learning_rate": 1e-2,
        "evaluate": ["loss"],
    }


def test_the_space_is_the_vector(shared):
    field = parse_space(Recipe.load(shared))
    sizes = ["tuner.serial", "tuner.parallel", "tuner.num_virtual_tokens"]
    assert {d.name for d in field.space.dims} == {"learning_rate", *sizes, *(f"layers.{i}" for i in range(4))}
    assert field.recipe_of(field.start) == Recipe.load(shared)
    made = field.recipe_of({**field.start, "tuner.serial": 0, "tuner.parallel": 32, "layers.1": False})
    assert made.tuner == {
        "name": "autopeft",
        "serial": 0,
        "parallel": 32,
        "num_virtual_tokens": 2,
        "insert": [1, 0, 1, 1],
    }
    assert field.space.features(np.zeros((1, 8))).shape == (
        1,
        4 + 2 * 4,
    ), "a size is one coordinate, a flag has one for each choice"
    (odd,) = parse_space(
        Recipe.load({**shared, "tuner": {"name": "autopeft", "serial": 24}}), ["tuner.serial"]
    ).space.dims
    assert odd.choices == (0, 1, 2, 4, 8, 16, 24, 32, 64) and odd.start == 24


@pytest.mark.slow
@pytest.mark.long
def test_a_search_of_vectors_covers_more_than_chance(shared, monkeypatch):
    """A made-up task of which the upper layers count most and sizes saturate, its numbers counted as they
    are; five seeds.
    """
    monkeypatch.setattr(_acquire, "POOL", 100)
    space = parse_space(
        Recipe.load(shared), ["tuner.serial", "tuner.parallel", "tuner.num_virtual_tokens", "layers"]
    ).space
    worth = np.array([0.05, 0.1, 0.3, 0.55])

    def f(point):
        sizes = np.array([point[f"tuner.{k}"] for k in ("serial", "parallel", "num_virtual_tokens")])
        on = np.array([point[f"layers.{i}"] for i in range(4)])
        gain = (np.array([0.35, 0.5, 0.15]) * (1 - np.exp(-sizes / [6, 12, 3]))).sum()
        return 1 - (worth * on).sum() * gain, on.sum() * (sizes * [65, 97, 32]).sum() / (4 * 64 * 194)

    def covered(name: str, seed: int, trials: int = 40) -> float:
        searcher, seen = build("searcher", name), []
        for i in range(trials):
            point = searcher.ask(space, seen, 2, Clock(seed)).point
            seen.append(Observation(i, point, f(point)))
        return hypervolume([s.values for s in seen], (1.1, 1.1))

    ours, chance = (np.mean([covered(name, seed) for seed in range(5)]) for name in ("bayes", "random"))
    assert ours > chance + 0.05


@pytest.mark.long
def test_a_configuration_that_was_found_moves_to_another_task(shared, tmp_path):
    how = dict(goals="quality,parameters", sampler="random", test_seeds="0,", subprocesses=False)
    found = luthier.search({**shared, "seed": 1}, trials=2, output_dir=tmp_path / "one", **how)
    best = found["chosen"][0]
    assert set(best["point"].values()) >= {True, False}, "some layers, not all"
    recipe = Recipe.load(tmp_path / "one" / f"{best['name']}.yaml")
    load = lambda: AutoModelForCausalLM.from_pretrained(shared["model"])
    attached = build("tuner", recipe.tuner).attach(load())
    assert moving(attached) == best["test"]["parameters"] == attached.settings.numbers(load())
    other = [{"prompt": f"{a}-{b}=", "completion": str(a - b)} for a in range(6) for b in range(6)]
    again = luthier.tune(recipe.but(data=other), folder=tmp_path / "again")
    assert again.stats["moving"] == best["test"]["parameters"] and again.after["loss"] < again.before["loss"]
    later = search_spec({**shared, "data": other}, earlier=tmp_path / "one")
    assert later.earlier == (best["point"],)
    assert build("tuner", later.space.recipe_of(best["point"]).tuner) == build("tuner", recipe.tuner)


@pytest.mark.long
def test_a_search_goes_past_zeros(shared, tmp_path):
    start = {
        **shared,
        "seed": 2,
        "tuner": {"name": "autopeft", "serial": 8, "parallel": 0, "num_virtual_tokens": 0},
    }
    how = dict(space="tuner.serial=0|8", sampler="random", test_seeds="0,", subprocesses=False)
    assert luthier.search(start, trials=1, output_dir=tmp_path / "alone", **how)["sentence"].startswith(
        "No configuration other"
    )
    found = luthier.search(start, trials=2, output_dir=tmp_path / "s", **how)
    said = [t["point"].get("tuner.serial") for t in found["trials"]]
    assert said[:2] == [8, 0] and len(said) == 3, "what moves nothing is not paid for"
    assert (
        "no trainable parameters" in found["trials"][1]["failed"]
        and "no significant difference" in found["sentence"]
    ), "the third is the recipe again"
    assert not any(t["failed"] for t in found["trials"] if t["point"].get("tuner.serial"))
