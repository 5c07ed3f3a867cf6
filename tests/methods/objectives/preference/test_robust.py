"""robust: is unbiased under flips."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from luthier.registry import build


def test_robust_is_unbiased_under_flips():
    """Over labels that are flipped with probability e, its mean is the loss of clean labels."""
    margin, e = torch.linspace(-3, 3, 7), 0.3
    made = build("objective", {"name": "robust", "beta": 1.0, "label_smoothing": e})
    torch.testing.assert_close((1 - e) * made.cost(margin) + e * made.cost(-margin), -F.logsigmoid(margin))
