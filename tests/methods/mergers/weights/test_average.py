"""average: merging one run or equal runs changes nothing; runs that moved other tensors do not merge;
impossible weights are refused; as many weights as runs.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.plans import tensors
from luthier.errors import RecipeError
from luthier.registry import build, names


@pytest.mark.parametrize("name", names("merger"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_one_run_or_equal_runs_changes_nothing(name, dtype):
    merger, one = build("merger", name), tensors(0, dtype)
    if "idempotent" in merger.contract:
        pytest.skip(merger.contract["idempotent"])
    for several in ([one], [one] * 2, [one] * 3, [one] * 7):
        merged = merger.merge(several, base=one)
        assert merged.keys() == one.keys() and all(
            torch.equal(merged[k], one[k]) and merged[k].dtype == dtype for k in one
        )


@pytest.mark.parametrize("name", names("merger"))
def test_runs_that_moved_other_tensors_do_not_merge(name):
    merger, one = build("merger", name), tensors(0)
    with pytest.raises(RecipeError, match="run 1 has c, which run 0 does not have"):
        merger.merge([one, one | {"c": torch.ones(1)}])
    with pytest.raises(RecipeError, match=r"a is \[4, 3\] in run 0 and \[3, 4\] in run 1"):
        merger.merge([one, one | {"a": torch.ones(3, 4)}])
    with pytest.raises(RecipeError, match="at least one run"):
        merger.merge([])


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [math.nan, 1]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(RecipeError, match="weights must not be negative"):
        build("merger", {"name": "average", "weights": weights})


def test_as_many_weights_as_runs():
    with pytest.raises(RecipeError, match="2 weights for 1 runs"):
        build("merger", {"name": "average", "weights": [1, 2]}).merge([tensors(0)])


def test_layers_have_weights_of_their_own():
    """One-hot by layer: each layer is that of a run; what is in no layer follows `weights`."""
    names_of = ["embed", *(f"model.layers.{i}.q.weight" for i in range(2))]
    several = [{name: tensors(k)["a"] + i for i, name in enumerate(names_of)} for k in range(2)]
    merger = build("merger", {"name": "average", "weights": [0, 1], "by_layer": [[1, 0], [1, 3]]})
    made = merger.merge(several)
    assert torch.equal(made["embed"], several[1]["embed"])
    assert torch.equal(made[names_of[1]], several[0][names_of[1]])
    torch.testing.assert_close(made[names_of[2]], (several[0][names_of[2]] + 3 * several[1][names_of[2]]) / 4)
    with pytest.raises(RecipeError, match="by_layer has 1 lists, but 2 layers"):
        build("merger", {"name": "average", "by_layer": [[1, 0]]}).merge(several)
