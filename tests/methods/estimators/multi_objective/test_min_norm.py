"""min_norm: is the shortest mix and no term is against it."""

from __future__ import annotations

import torch

from helpers.objectives import combined


def test_min_norm_is_the_shortest_mix_and_no_term_is_against_it():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 1.0])
    share = float(((b - a) @ b / (a - b).square().sum()).clamp(0, 1))
    assert torch.allclose(combined("min_norm", torch.stack([a, b])), share * a + (1 - share) * b, atol=1e-5)
    torch.manual_seed(0)
    grads = torch.randn(4, 12)
    step = combined("min_norm", grads)
    assert (grads @ step >= float(step.square().sum()) - 1e-2).all()
