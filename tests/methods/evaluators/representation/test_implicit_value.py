"""implicit_value: values correlate where they are values; is measured."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.registry import build


def test_values_correlate_where_they_are_values():
    from luthier.methods.evaluators.representation.implicit_value import correlation

    reward = torch.tensor([0.0, 1.0, 0.5, -1.0])
    # a table whose log-sum-exp is a line of the reward
    q = torch.stack([reward * 2 + 1 - math.log(3)] * 3, 1)
    assert correlation(q.logsumexp(1), reward) == pytest.approx(1.0) and correlation(
        -q.logsumexp(1), reward
    ) == pytest.approx(-1.0)
    assert correlation(torch.ones(4), reward) is None


def test_implicit_value_is_measured(roles, tmp_path):
    rows = [
        {"id": str(i), "prompt": f"{i}", "completions": ["a", "bc"], "scores": [float(i), -float(i)]}
        for i in range(4)
    ]
    with torch.no_grad():
        out = build("evaluator", "implicit_value").run(roles, rows, tmp_path, "after")
    assert set(out) == {"value_correlation", "value_correlation_last"} and all(
        -1 <= v <= 1 for v in out.values()
    )
