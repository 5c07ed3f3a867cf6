"""The contracts of estimators, transforms and optimizers: descent, settings, a state that resumes."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.optimizers import OPTIMIZERS, TRANSFORMS, Rig, same
from helpers.rows import SUMS
from luthier.registry import build, find, helps, names

ESTIMATORS = [
    n for n in names("estimator") if not find("estimator", n).requires
]  # others want more than any moving tensors: tested where it is


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def small(name: str) -> dict:
    """An estimator with the settings that it declares for tiny models."""
    return {"name": name, **find("estimator", name).example}


def skipped(cls, test: str) -> None:
    if test in cls.contract:
        pytest.skip(f"{cls.name}: {cls.contract[test]}")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_make_the_loss_smaller_and_leave_the_rest_alone(name):
    skipped(find("estimator", name), "descends")
    rig = Rig(estimator=small(name), transforms=build("optimizer", "adamw").chain(), total=200)
    began, frozen = rig.distance(), rig.model.frozen.detach().clone()
    rig.go(200)
    assert rig.distance() < 0.7 * began and torch.equal(rig.model.frozen, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_go_on_bit_for_bit(name, dtype, tmp_path):
    def make():
        return Rig(estimator=small(name), transforms=build("optimizer", "adamw").chain(), dtype=dtype)

    whole, broken = make().go(8), make().go(3).kill_and_load(tmp_path, make).go(5)
    assert same(whole, broken) and whole.losses[3:] == broken.losses


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_put_back_what_they_moved_when_memory_runs_out(name, dtype, call):
    skipped(find("estimator", name), "restores")

    def make():
        settings = {"n_probes": 2} if name == "mezo" else {}
        return Rig(
            estimator=small(name) | settings, transforms=build("optimizer", "adamw").chain(), dtype=dtype
        ).go(1)

    rig, calm = make(), make()
    before, places = rig.tuner.tensors(), {k: p.data_ptr() for k, p in rig.tuner.parameters().items()}
    rig.calls, rig.fail_at = 0, call
    try:
        rig.go(1)
    except RuntimeError:
        after = rig.tuner.parameters()
        assert all(torch.equal(before[k], after[k]) and after[k].data_ptr() == places[k] for k in before)
        rig.go(1)  # the loop tries again with smaller micro-batches
    assert same(rig, calm.go(1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_train_a_language_model(name, base, tmp_path):
    change = {
        "estimator": small(name),
        "data": SUMS[:4],
        "max_steps": 40,
        "learning_rate": 2e-3,
        "save_steps": 40,
    }
    change |= {"objective": "sft + kl"} if name == "gradient_dropout" else {}
    losses = luthier.tune(base | change | {"lr_scheduler_type": "constant"}, folder=tmp_path).losses
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_keep_their_promises(name, tmp_path):
    """Finite updates of the right shape; gradients and weights are only read; state survives a checkpoint bit
    for bit.
    """
    skipped(find("transform", name), "promises")

    def make():
        return Rig(transforms=(build("transform", name),))

    rig = make()
    param_groups = {s.name: s for s in rig.chain.param_groups()}
    rig.closure()
    grads = {n: {k: p.grad for k, p in s.params.items()} for n, s in param_groups.items()}
    kept = {n: {k: g.clone() for k, g in slots.items()} for n, slots in grads.items()}
    weights = rig.tuner.tensors()
    transform = rig.chain.transforms[0]
    transform.begin(rig.chain.rate, last=False)
    gathered = transform.gather(grads)
    for n, group in param_groups.items():
        out = transform.apply(gathered[n], {}, group, 1)
        assert all(u.shape == group.params[k].shape and u.isfinite().all() for k, u in out.items())
        assert all(torch.equal(grads[n][k], kept[n][k]) for k in kept[n])
    assert all(torch.equal(p, weights[k]) for k, p in rig.tuner.parameters().items())
    assert same(make().go(8), make().go(3).kill_and_load(tmp_path, make).go(5))


@pytest.mark.parametrize("kind", ["estimator", "transform", "optimizer"])
def test_every_setting_is_explained(kind):
    silent = [
        f"{name}.{key}" for name in names(kind) for key, said in helps(find(kind, name)).items() if not said
    ]
    assert not silent


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_descend_and_go_on_bit_for_bit(name, tmp_path):
    skipped(find("optimizer", name), "descends")

    def make():
        return Rig(transforms=build("optimizer", {"name": name, "weight_decay": 0.01}).chain(), total=200)

    whole = make()
    began = whole.distance()
    whole.go(200)
    assert whole.distance() < 0.7 * began
    assert same(whole, make().go(17).kill_and_load(tmp_path, make).go(183))
