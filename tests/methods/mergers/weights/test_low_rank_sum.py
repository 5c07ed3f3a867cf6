"""low_rank_sum: products, not factors, are averaged."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import RecipeError
from luthier.registry import build


def adapter(seed: int, r: int = 2) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, 6, generator=rng), torch.randn(5, r, generator=rng)
    return {"l.A": A, "l.B": B, "head": torch.randn(3, generator=rng)}


def product(tensors: dict) -> torch.Tensor:
    return tensors["l.B"].double() @ tensors["l.A"].double()


def merged(several, **settings):
    return build("merger", {"name": "low_rank_sum", **settings}).merge(several)


def test_the_product_is_the_weighted_mean_of_products():
    several = [adapter(0), adapter(1), adapter(2)]
    exact = (2 * product(several[0]) + product(several[2])) / 3
    wide = merged(several, weights=[2, 0, 1], rank=4)
    assert wide["l.A"].shape == (4, 6) and wide["l.B"].shape == (5, 4)
    torch.testing.assert_close(product(wide), exact, atol=1e-6, rtol=1e-5)
    padded = merged(several, weights=[2, 0, 1], rank=7)
    torch.testing.assert_close(product(padded), exact, atol=1e-6, rtol=1e-5)
    U, S, Vh = torch.linalg.svd(exact)
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    near = merged(several, weights=[2, 0, 1])
    assert near["l.A"].shape == (2, 6)
    torch.testing.assert_close(product(near), best, atol=1e-6, rtol=1e-5)
    averaged = build("merger", {"name": "average", "weights": [2, 0, 1]}).merge(several)
    assert (product(averaged) - exact).norm() > 2 * (product(near) - exact).norm()
    torch.testing.assert_close(near["head"], (2 * several[0]["head"] + several[2]["head"]) / 3)


def test_all_weight_on_one_run_is_that_run():
    several = [adapter(0), adapter(1)]
    for weights, own in (([1, 0], several[0]), ([0, 3], several[1])):
        alone = merged(several, weights=weights)
        assert all(torch.equal(alone[name], own[name]) for name in own)
    with pytest.raises(RecipeError, match="weights must not be negative"):
        merged(several, weights=[0, 0])
    with pytest.raises(RecipeError, match="1 weights for 2 runs"):
        merged(several, weights=[1])
    with pytest.raises(RecipeError, match="are not factors of one matrix"):
        merged([{"l.A": torch.ones(2, 3), "l.B": torch.ones(4, 3)}])
