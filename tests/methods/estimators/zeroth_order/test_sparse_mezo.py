"""sparse_mezo: large weights stay, small ones are moved as MeZO moves them."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.optimizers import Rig, Seen, same
from helpers.rows import SUMS
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.estimators.zeroth_order.mezo import direction
from luthier.registry import build


def rig(sparsity, **settings):
    chain = build("optimizer", {"name": "sgd", "max_grad_norm": 0}).chain()
    return Rig(
        estimator={"name": "sparse_mezo", "sparsity": sparsity, **settings}, transforms=chain, total=40
    )


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_large_weights_stay_bit_for_bit(sparsity):
    run = rig(sparsity)
    start = run.tuner.tensors()
    run.go(20)
    for k, p in run.tuner.tensors().items():
        count = round((1 - sparsity) * p.numel())
        limit = start[k].abs().flatten().sort().values[count - 1]
        large = start[k].abs() > limit
        assert int((~large).sum()) == count
        assert torch.equal(p[large], start[k][large])
        assert not torch.equal(p[~large], start[k][~large])


def test_without_sparsity_it_is_mezo():
    chain = build("optimizer", {"name": "sgd", "max_grad_norm": 0}).chain()
    mezo = Rig(estimator={"name": "mezo", "n_probes": 2}, transforms=chain, total=40)
    assert same(rig(0.0, n_probes=2).go(10), mezo.go(10))


def test_it_is_the_finite_difference_along_masked_directions():
    run = Rig(estimator={"name": "sparse_mezo", "sparsity": 0.5, "eps": 1e-2}, transforms=(seen := Seen(),))
    start = run.tuner.tensors()
    run.chain.learning_rate = 0.0
    run.go(1)
    clock, z = Clock(seed=3), {}
    for group in run.tuner.param_groups():
        for slot, p in group.params.items():
            name = f"{group.name}.{slot}"
            limit = start[name].abs().flatten().kthvalue(round(p.numel() / 2)).values
            z[name] = direction(clock, 0, group.name, slot, p) * (start[name].abs() <= limit)
    sides = []
    for sign in (1, -1):
        with run.tuner.using({k: start[k] + sign * 1e-2 * z[k] for k in z}):
            sides.append(run.distance())
    slope = (sides[0] - sides[1]) / 2e-2
    assert all(torch.allclose(seen.grads[k], slope * z[k], atol=1e-4) for k in z)


def test_tuners_that_change_what_trains_are_refused(base, tmp_path):
    recipe = base | {"estimator": "sparse_mezo", "tuner": "lisa", "data": SUMS[:4], "max_steps": 2}
    with pytest.raises(RecipeError, match="changes which"):
        luthier.tune(recipe, folder=tmp_path)
