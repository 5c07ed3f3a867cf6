"""exo_pair: exo costs nothing where the policy is the label."""

from __future__ import annotations

import pytest
import torch

from luthier.registry import build


def test_exo_costs_nothing_where_the_policy_is_the_label():
    margin = torch.tensor([0.0, 1.0])
    made = build("objective", {"name": "exo_pair", "beta": 1.0, "label_smoothing": 0.5})
    assert float(made.cost(margin)[0]) == pytest.approx(0.0, abs=1e-7) and float(made.cost(margin)[1]) > 0.05
