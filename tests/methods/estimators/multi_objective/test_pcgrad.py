"""pcgrad: leaves agreeing gradients and projects conflicting ones."""

from __future__ import annotations

import torch

from helpers.objectives import combined


def test_pcgrad_leaves_agreeing_gradients_and_projects_conflicting_ones():
    agree = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    assert torch.allclose(combined("pcgrad", agree), agree.sum(0))
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 1.0])
    want = (a - (a @ b) / (b @ b) * b) + (b - (b @ a) / (a @ a) * a)
    assert torch.allclose(combined("pcgrad", torch.stack([a, b])), want)
