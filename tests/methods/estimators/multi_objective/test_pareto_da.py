"""pareto_da: the pareto program keeps its bounds; a guide goes down where a plain sum would raise it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.estimators.multi_objective.pareto_da import weights
from luthier.registry import build


@pytest.mark.long
def test_the_pareto_program_keeps_its_bounds():
    rng = np.random.default_rng(0)
    for i in range(1000):
        k = 2 + i % 3
        G, v = rng.normal(size=(k, 4)), rng.normal(size=4)
        C, c = G @ G.T, G @ v
        a = weights(C, c, guided=bool(i % 5))
        assert abs(a.sum() - 1) < 1e-6 and (a >= -1e-9).all()
        least = np.zeros(k)
        if i % 5 and (c > 0).any():
            least = np.where(c > 0, -np.inf, c)
            least[c.argmax()] = 0
        assert (C @ a >= least - 1e-6 * np.abs(C).max()).all()
    same = np.ones((3, 1)) @ rng.normal(size=(1, 5))
    assert np.allclose(weights(same @ same.T, same @ same[0], True) @ same, same[0])
    axes = np.eye(4)[:3]
    assert np.allclose(weights(axes @ axes.T, axes @ axes[1], True), [0, 1, 0])
    G, v = np.array([[1.0, 0.2], [-0.4, 1.0]]), np.array([0.3, 1.0])  # two terms: the best of a fine grid
    C, c, grid = G @ G.T, G @ v, np.linspace(0, 1, 20001)
    may = [x for x in grid if C[int(c.argmax())] @ [x, 1 - x] >= -1e-9]
    assert float(c @ weights(C, c, True)) == pytest.approx(max(c @ [x, 1 - x] for x in may), abs=1e-3)


def test_a_guide_goes_down_where_a_plain_sum_would_raise_it():
    """Two losses pull apart, one of them against the guide: |x - p|^2 for three places p."""
    places = torch.tensor([[0.0, 2.0], [3.0, -1.0], [0.2, 1.5]])  # the last is only looked at
    x = torch.tensor([0.4, 0.6])
    grads, losses = 2 * (x - places), (x - places).square().sum(1)
    share = build("estimator", "pareto_da").combine((grads @ grads.T).double(), losses, None).float()
    assert float(share[-1]) == 0 and float(share.sum()) == pytest.approx(2)
    after = lambda step: float((x - 0.02 * step - places[-1]).square().sum())
    assert after(share @ grads) < float(losses[-1]) < after(grads[0] + grads[1])
    assert torch.equal(
        build("estimator", {"name": "pareto_da", "guide": 2})
        .combine((grads @ grads.T).double(), losses, None)
        .float(),
        share,
    )
    with pytest.raises(RecipeError, match="has 3 terms"):
        build("estimator", {"name": "pareto_da", "guide": 3}).combine(
            (grads @ grads.T).double(), losses, None
        )


@pytest.mark.long
def test_a_small_task_keeps_its_bound_beside_a_large_one():
    """Gradients of lengths from 1e-3 to 1e3: no task that must not rise is stepped against."""
    rng = np.random.default_rng(1)
    for i in range(500):
        k = 2 + i % 3
        G = rng.normal(size=(k, 4)) * 10 ** rng.uniform(-3, 3, size=(k, 1))
        v = rng.normal(size=4) * 10 ** rng.uniform(-3, 3)
        C, c = G @ G.T, G @ v
        share = weights(C, c, guided=bool(i % 5))
        assert abs(share.sum() - 1) < 1e-6 and (share >= -1e-9).all()
        least = np.zeros(k)
        if i % 5 and (c > 0).any():
            least = np.where(c > 0, -np.inf, c)
            least[c.argmax()] = 0
        step = share @ G
        room = 1e-5 * np.linalg.norm(step) * np.linalg.norm(G, axis=1)
        assert (G @ step >= least - room - 1e-9 * np.abs(least.clip(-1e300))).all()
