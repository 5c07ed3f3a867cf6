"""optimizer: bfloat16 moves through float32 masters; a weight that somebody rewrites stays rewritten; state
lives while its site moves; state survives the disk as it is.
"""

from __future__ import annotations

import pytest
import torch

from helpers.optimizers import TRANSFORMS, Rig
from luthier.methods.transforms._base import LazyGradients
from luthier.registry import build, find
from luthier.storage import checkpoints
from luthier.train import optimizer as _chain


def test_bfloat16_moves_through_float32_masters():
    """Steps too small to show in bfloat16 add up; the weight is always its master, rounded."""
    rig = Rig(transforms=(build("transform", "adam"),), dtype=torch.bfloat16, learning_rate=1e-4, total=40)
    start = rig.tuner.tensors()
    rig.go(40)
    for group in rig.tuner.param_groups():
        for slot, p in group.params.items():
            master = rig.chain.state[group.name]["master"][slot]
            assert master.dtype == torch.float32 and torch.equal(p, master.bfloat16())
            assert not torch.equal(master, start[f"{group.name}.{slot}"].float())
    assert rig.distance() < 0.9999 * Rig(dtype=torch.bfloat16).distance()


def test_a_weight_that_somebody_rewrites_stays_rewritten():
    """A tuner may project or reset a bfloat16 weight after a step: the master follows, and where nothing was
    written it stays.
    """
    rig, free = (
        Rig(transforms=(build("transform", "adam"),), dtype=torch.bfloat16, learning_rate=1e-4).go(3)
        for _ in range(2)
    )
    with torch.no_grad():
        rig.model.weight[0] = 7.0
    rig.go(1)
    free.go(1)
    masters = [r.chain.state["weight"]["master"]["weight"] for r in (rig, free)]
    assert torch.allclose(masters[0][0], torch.tensor(7.0), atol=1e-2) and torch.equal(
        masters[0][1:], masters[1][1:]
    )


def test_state_lives_while_its_site_moves():
    rig = Rig(transforms=(build("transform", "adam"),)).go(2)
    assert set(rig.chain.state) == {"weight", "bias | norm", "low"} and rig.chain.state["low"]["step"] == 2
    rig.model.bias.requires_grad_(False)
    still = rig.model.bias.detach().clone()
    rig.go(1)
    assert set(rig.chain.state) == {"weight", "low"} and torch.equal(rig.model.bias, still)
    rig.model.bias.requires_grad_(True)
    rig.go(1)
    assert rig.chain.state["bias | norm"]["step"] == 1 and rig.chain.state["low"]["step"] == 4


def test_state_survives_the_disk_as_it_is(tmp_path):
    state = {
        "a | b||c": {"step": 3, "0": {"w": {"m": torch.ones(2), "share": 0.1}}, "on": True},
        "x": {"step": 1},
    }
    made = checkpoints.Checkpoint({"w": torch.ones(1)}, state, 5, None, {})
    back = checkpoints.load(checkpoints.save(tmp_path, made, 1)).state
    assert (
        back["a | b||c"]["step"] == 3
        and type(back["a | b||c"]["step"]) is int
        and back["a | b||c"]["on"] is True
    )
    assert back["a | b||c"]["0"]["w"]["share"] == 0.1 and torch.equal(
        back["a | b||c"]["0"]["w"]["m"], torch.ones(2)
    )


def test_state_comes_back_where_its_weights_are():
    """A checkpoint is read onto the CPU; what belongs to a weight elsewhere must follow it there."""
    rig, other = Rig(transforms=(build("transform", "adam"),)).go(1), Rig()
    other.model.to("meta")
    other.chain.load({**rig.chain.state, "gone": {"step": 3}})
    tensors, leaves = checkpoints.flatten(other.chain.state)
    assert (
        {t.device.type for t in tensors.values()} == {"meta"}
        and leaves["low | step"] == 1
        and "gone" not in other.chain.state
    )


def test_clipping_holds_no_second_copy_of_the_gradients():
    rig = Rig(transforms=(clip := build("transform", {"name": "clip", "max_grad_norm": 0.1}),))
    rig.closure()
    grads = {s.name: {k: p.grad for k, p in s.params.items()} for s in rig.chain.param_groups()}
    small = clip.gather(grads)
    assert isinstance(small, LazyGradients) and len(small) == 3
    assert sum(
        float(g.square().sum()) for slots in small.values() for g in slots.values()
    ) ** 0.5 == pytest.approx(0.1, rel=1e-4)


CLASSES = {name: find("transform", name) for name in TRANSFORMS}
POINTWISE = [n for n, cls in CLASSES.items() if cls.pointwise and "promises" not in cls.contract]


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_pointwise_may_go_in_pieces(name, dtype, monkeypatch):
    """Bit for bit what the whole tensor gives, its state and the ages of entries that began anew among it."""

    def trained(piece: int):
        monkeypatch.setattr(_chain, "PIECE", piece)
        rig = Rig([build("transform", name)], dtype=dtype)
        monkeypatch.setattr(
            rig.tuner,
            "extra_grads",
            lambda group: {"weight": 0.1 * rig.model.weight.detach().float()} if group == "weight" else {},
        )
        for _ in range(4):
            rig.tuner.resets = {"weight.weight": rig.model.weight > 0.5}
            rig.go(1)
        return rig

    whole, parts = trained(10**9), trained(9)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    )
    a, b = (checkpoints.flatten(r.chain.state)[0] for r in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(whole.model.weight, Rig([build("transform", name)], dtype=dtype).model.weight)
