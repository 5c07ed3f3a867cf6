"""task_arithmetic, ties, dare, breadcrumbs, slerp: closed forms, tails, ends and reductions."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.mergers.weights.slerp import Slerp, at_depth, between
from luthier.registry import build


def tensors(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    names = [
        f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")
    ]
    return {name: torch.randn(20, 10, generator=rng) for name in ("embed", *names)}


BASE, ONE, OTHER = tensors(0), tensors(1), tensors(2)


def merge(name: str, *several, **settings):
    return build("merger", {"name": name, **settings}).merge(several or [ONE, OTHER], BASE)


def close(one, other, **how):
    torch.testing.assert_close(one, other, **{"atol": 1e-6, "rtol": 1e-6, **how})


def test_task_arithmetic_adds_and_unlearns():
    added = {k: BASE[k] + 0.4 * ((ONE[k] - BASE[k]) + 2 * (OTHER[k] - BASE[k])) for k in BASE}
    close(merge("task_arithmetic", weights=[1.0, 2.0], scale=0.4), added, atol=1e-5)
    close(merge("task_arithmetic", ONE, weights=[0.0]), BASE)
    close(merge("task_arithmetic", ONE, ONE, weights=[1.0, -1.0]), BASE)


def test_what_reduces_to_task_arithmetic():
    plain = merge("task_arithmetic", scale=0.3)
    close(merge("breadcrumbs", alpha=0.3, beta=0.0, gamma=1.0), plain)
    close(merge("breadcrumbs", ONE, alpha=1.0, beta=0.0, gamma=1.0), ONE)
    close(merge("dare", density=1.0, weights=[0.3, 0.3]), plain)
    close(merge("ties", ONE, density=1.0), ONE)


def test_breadcrumbs_leave_out_both_tails():
    merged = merge("breadcrumbs", ONE, alpha=1.0, beta=0.5, gamma=0.9)
    for name, start in BASE.items():
        change, moved = ONE[name] - start, (merged[name] - start).abs() > 1e-9
        assert int(moved.sum()) == round(0.4 * change.numel())
        sizes = change.abs().flatten().sort().values
        inside = change.abs()[moved]
        assert float(inside.min()) >= float(sizes[100]) - 1e-9
        assert float(inside.max()) <= float(sizes[179]) + 1e-9


def test_ties_by_hand():
    """Entries: both agree, they disagree and one is larger, one was trimmed."""
    base = {"w": torch.zeros(4)}
    one, other = {"w": torch.tensor([2.0, 3.0, 4.0, 0.1])}, {"w": torch.tensor([4.0, -1.0, 0.2, -5.0])}
    merged = build("merger", {"name": "ties", "density": 0.75}).merge([one, other], base)
    close(merged["w"], torch.tensor([3.0, 3.0, 4.0, -5.0]))
    weighed = build("merger", {"name": "ties", "density": 0.75, "weights": [1.0, 2.0]}).merge(
        [one, other], base
    )
    close(weighed["w"], torch.tensor([(2.0 + 8.0) / 3, 3.0, 4.0, -5.0]))


def test_dare_keeps_the_mean_and_repeats():
    base, tuned = {"w": torch.zeros(40_000)}, {"w": torch.ones(40_000)}
    settings = {"name": "dare", "density": 0.25}
    merged = build("merger", settings).merge([tuned], base)["w"]
    assert {*merged.unique().tolist()} == {0.0, 4.0}
    assert float(merged.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(build("merger", settings).merge([tuned], base)["w"], merged)
    assert not torch.equal(build("merger", {**settings, "draw": 1}).merge([tuned], base)["w"], merged)


def test_slerp_ends_at_its_parents():
    for t, parent in ((0.0, ONE), (1.0, OTHER)):
        merged = merge("slerp", t=t)
        assert all(torch.equal(merged[k], parent[k]) for k in parent)
    with pytest.raises(RecipeError, match="two runs"):
        merge("slerp", ONE, OTHER, ONE)
    close(merge("slerp", ONE, t=0.3), {k: between(BASE[k], ONE[k], 0.3) for k in ONE})


def test_slerp_keeps_the_norm_and_colinear_is_a_line():
    a, b = ONE["embed"] / ONE["embed"].norm(), OTHER["embed"] / OTHER["embed"].norm()
    assert float(between(a, b, 0.5).norm()) == pytest.approx(1.0, abs=1e-6)
    close(between(a, 3 * a, 0.25), 1.5 * a)
    angle = math.acos(float((a * b).sum()))
    by_hand = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    close(between(a, b, 0.3), by_hand)


def test_profiles_are_interpolated_over_depth():
    profile = [0.0, 0.5, 0.3, 0.7, 1.0]
    assert [at_depth(profile, d) for d in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 0.3, 1.0]
    assert at_depth(profile, 0.125) == pytest.approx(0.25) and at_depth([0.4], 0.9) == 0.4
    slerp = Slerp(attention=[0.0, 1.0], mlp=[1.0, 0.0], t=0.5)
    shares = {name: slerp.share(name, 3) for name in ONE}
    assert shares["embed"] == 0.5
    assert [shares[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)] == [0.0, 0.5, 1.0]
    assert [shares[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(3)] == [1.0, 0.5, 0.0]


def test_a_weight_for_each_run():
    with pytest.raises(RecipeError, match="3 weights for 2 runs"):
        merge("ties", weights=[1.0, 1.0, 1.0])
    with pytest.raises(RecipeError, match="base model"):
        build("merger", "ties").merge([ONE], None)
