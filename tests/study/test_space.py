"""space: points and vectors are one; a space follows from what methods declare; layers are left alone; what
cannot be searched is refused.
"""

from __future__ import annotations

import numpy as np
import pytest

from helpers.rows import PAIRS, SUMS
from helpers.search import MIXED
from luthier.errors import RecipeError
from luthier.methods.searchers._base import (
    Dim,
)
from luthier.recipe.recipe import Recipe
from luthier.study.search import search_spec
from luthier.study.space import only_layers, parse_space

pytest.importorskip("optuna")


def test_points_and_vectors_are_one():
    for u in np.random.default_rng(0).random((50, 5)):
        point = MIXED.decode(u)
        assert MIXED.decode(MIXED.encode(point)) == pytest.approx(point)
    assert MIXED.features(np.array([MIXED.encode(MIXED.start())])).shape == (1, 2 + 1 + 1 + 1 + 2)
    with pytest.raises(ValueError, match="not a range with a logarithm"):
        Dim("x", 0, 1, log=True)


def test_a_space_follows_from_what_methods_declare(tiny):
    base = Recipe.load({"model": tiny, "data": SUMS, "tuner": {"name": "lora", "r": 8, "lora_alpha": 4}})
    usual = parse_space(base)
    assert {d.name for d in usual.space.dims} == {"learning_rate", "tuner.r"} and usual.recipe_of(
        usual.start
    ).yaml() == base.yaml()
    several = parse_space(
        base, ["tuner=lora|ssf|dora, learning_rate=1e-4..1e-2", "per_device_train_batch_size=4|8"]
    )
    dims = {d.name: d for d in several.space.dims}
    assert (
        dims["lora.r"].when == ("tuner", "lora")
        and dims["dora.r"].log
        and "ssf.r" not in dims
        and dims["learning_rate"].log
    )
    made = several.recipe_of(
        {"tuner": "dora", "dora.r": 32, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    )
    assert made.tuner == {"name": "lora", "use_dora": True, "r": 32} and made.learning_rate == 1e-3
    assert several.recipe_of({"tuner": "lora", "lora.r": 16}).tuner == {
        "name": "lora",
        "r": 16,
        "lora_alpha": 4,
    }, "its other settings stay"
    assert parse_space(base, ["tuner.r=2..4"]).start is None
    both = parse_space(Recipe.load({"model": tiny, "data": PAIRS, "objective": "dpo"}), ["objective=dpo|ipo"])
    assert {"objective", "dpo.beta", "ipo.beta"} <= {d.name for d in both.space.dims}
    assert both.recipe_of({"objective": "ipo", "ipo.beta": 0.3}).objective == {"name": "ipo", "beta": 0.3}


def test_layers_are_left_alone(four_layers):
    base = Recipe.load({"model": four_layers, "data": SUMS, "tuner": "lora"})
    flags = parse_space(base, ["layers"])
    assert [d.name for d in flags.space.dims] == [f"layers.{i}" for i in range(4)] and flags.recipe_of(
        flags.start
    ) == base
    from luthier.model.load import assemble
    from luthier.recipe.validate import build_methods

    made = flags.recipe_of({"layers.0": True, "layers.1": False, "layers.2": True, "layers.3": False})
    assert made.yaml() == only_layers(base, [0, 2], 4).yaml()
    param_groups = [s.name for s in assemble(made, build_methods(made)).tuner.param_groups()]
    assert (
        param_groups
        and all(".0." in s or ".2." in s for s in param_groups)
        and any(".2." in s for s in param_groups)
    )


@pytest.mark.parametrize(
    ("said", "how", "why"),
    [
        (["tuner.q"], {}, "has no setting 'q'"),
        (["learning_rat"], {}, "did you mean 'learning_rate'"),
        (["eval_data"], {}, "must stay fixed"),
        (["lora_alpha=1..4"], {}, "a recipe has no key 'lora_alpha'"),
        (["tuner.lora_alpha"], {}, "declares no range"),
        (["tuner.r=64..4"], {}, "expected a range"),
        (["objective=sft|dpo"], {}, "objective=dpo.*pairs"),
        (["tuner=lora|sff"], {}, "did you mean 'ssf'"),
        (["learning_rate=-1..1"], {}, "learning_rate"),
        ([], {"sampler": "tpee"}, "did you mean 'tpe'"),
        ([], {"budget": "100 steps"}, "must be a time such as"),
        ([], {"budget": "1h", "trials": 3}, "not both"),
        ([], {"goals": ["ranking_accuracy"]}, "requires pairs"),
        ([], {"earlier": "nowhere"}, "has no finished search"),
    ],
)
def test_what_cannot_be_searched_is_refused(tiny, said, how, why):
    with pytest.raises(RecipeError, match=why):
        search_spec({"model": tiny, "data": SUMS, "max_steps": 2}, said, **how)
