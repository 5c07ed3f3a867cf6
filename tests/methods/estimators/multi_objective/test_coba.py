"""coba: weights on the simplex that shift to the slower task, and away from one that diverges."""

from __future__ import annotations

import pytest

from helpers.terms import Quadratics
from luthier.errors import RecipeError
from luthier.methods.estimators.multi_objective.coba import slope
from luthier.registry import build


def shares(*losses, **settings):
    """After all of these losses, one step at a time."""
    made = build("estimator", {"name": "coba", "warmup": 3, "window": 5, **settings})
    upper = {"losses": [[] for _ in losses], "slopes": [[] for _ in range(len(losses) + 1)]}
    out = None
    for step in zip(*losses, strict=True):
        for history, value in zip(upper["losses"], step, strict=True):
            history.append(value)
        out = made.shares(upper)
    return out.tolist()


def test_weights_shift_to_the_slower_task():
    fast, slow = [1 - 0.05 * k for k in range(12)], [1 - 0.01 * k for k in range(12)]
    a, b = shares(fast, slow)
    assert a + b == pytest.approx(1) and b > a + 0.1
    assert shares(fast[:3], slow[:3]) == [0.5, 0.5]
    assert shares(fast, fast) == pytest.approx([0.5, 0.5])
    run = Quadratics("coba", warmup=3, window=5).go(12)
    assert run.metrics["mix/slow"] > run.metrics["mix/fast"] > 0.05


def test_a_task_that_diverges_loses_weight():
    """Its held-out loss rises: the relative score alone would raise its weight."""
    steady = [1 - 0.02 * k for k in range(12)]
    turning = [1 - 0.02 * k for k in range(6)] + [0.9 + 0.06 * k for k in range(6)]
    a, b = shares(steady, turning)
    assert b < 0.5 < a and a + b == pytest.approx(1)
    assert min(shares(steady, turning, least=0.9)) >= 0.45


def test_held_out_terms_are_measured_and_not_learned():
    run = Quadratics("coba", warmup=3, window=5, validation={"fast": "slow"}, third=True).go(6)
    assert run.model.weight[1].item() == 0.0 < run.model.weight[0].item()
    assert len(run.state("coba")["losses"]) == 2 and "mix/slow" not in run.metrics


def test_slope_of_a_line_and_what_is_refused():
    import torch

    assert slope(torch.tensor([1.0, 3.0, 5.0]).double()) == pytest.approx(2)
    with pytest.raises(RecipeError, match="c is no term"):
        made = build("estimator", {"name": "coba", "validation": {"a": "c"}})
        made.suits(build("objective", {"name": "by_source", "sources": ["a", "b"]}))
