"""wise: a line between two models."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import RecipeError
from luthier.registry import build


def tensors(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    names = ["embed", *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("q", "down"))]
    return {name: torch.randn(4, 3, generator=rng).to(dtype) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_both_models_and_the_middle_is_halfway(dtype):
    base, tuned = tensors(0, dtype), tensors(1, dtype)
    ends = [build("merger", {"name": "wise", "alpha": a}).merge([tuned], base) for a in (0.0, 1.0)]
    for name in base:
        assert torch.equal(ends[0][name], base[name]) and torch.equal(ends[1][name], tuned[name])
    half = build("merger", "wise").merge([tuned], base)
    torch.testing.assert_close(half, {k: ((base[k].float() + tuned[k].float()) / 2).to(dtype) for k in base})
    beyond = build("merger", {"name": "wise", "alpha": 2.0}).merge([tuned], base)["embed"].float()
    expected = 2 * tuned["embed"].float() - base["embed"].float()
    torch.testing.assert_close(beyond, expected, atol=3e-2, rtol=1e-2)


def test_each_layer_can_have_a_share_of_its_own():
    base, tuned = tensors(0), tensors(1)
    made = build("merger", {"name": "wise", "alpha": [0.0, 1.0, 0.25], "outside": 0.0}).merge([tuned], base)
    for name in base:
        share = {"0": 0.0, "1": 1.0, "2": 0.25}.get(name.split(".")[2] if "." in name else "", 0.0)
        torch.testing.assert_close(made[name], base[name] + share * (tuned[name] - base[name]))
    with pytest.raises(RecipeError, match="alpha has 2 shares, but 3 layers"):
        build("merger", {"name": "wise", "alpha": [0.0, 1.0]}).merge([tuned], base)
    with pytest.raises(RecipeError, match="takes one run"):
        build("merger", "wise").merge([tuned, tuned], base)
