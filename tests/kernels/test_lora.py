"""lora: in the models precision is its plain twin."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("asked", ["x y A B", "A B", "x y", "B"])
def test_lora_in_the_models_precision_is_its_plain_twin(dtype, atol, asked):
    """Values and every gradient; in bf16 within its rounding."""
    from luthier.kernels import lora

    def given():
        g = torch.Generator().manual_seed(0)
        shapes = {"x": (2, 5, 12), "y": (2, 5, 7), "A": (3, 12), "B": (7, 3)}
        made = {
            k: torch.randn(s, generator=g).to(dtype if k in "xy" else torch.float32)
            for k, s in shapes.items()
        }
        return {k: v.requires_grad_(k in asked.split()) for k, v in made.items()}

    a, b = given(), given()
    want, got = lora.plain(**a, scale=0.7), lora.update(**b, scale=0.7)
    assert got.dtype == want.dtype and torch.allclose(got.float(), want.float(), atol=atol * 4)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (want.float() * weight).sum().backward()
    (got.float() * weight).sum().backward()
    for name in asked.split():
        assert a[name].grad.dtype == b[name].grad.dtype
        assert torch.allclose(a[name].grad.float(), b[name].grad.float(), atol=atol * 6), name
