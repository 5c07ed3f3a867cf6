"""gradient_dropout: gradient dropout; in a run."""

from __future__ import annotations

import pytest
import torch

import luthier
from luthier.errors import RecipeError
from luthier.methods.estimators.first_order.gradient_dropout import chance
from luthier.registry import build


def test_gradient_dropout():
    a = torch.randn(1000)
    assert torch.allclose(chance(a, a), torch.ones(1000), atol=1e-4) and chance(a, -1e6 * a).max() < 1e-4
    assert torch.allclose(chance(a, -a), torch.full((1000,), 0.5), atol=1e-4)
    method = build("estimator", "gradient_dropout")
    rng = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(method.dropped(a, 5 * a, rng()), a) and not method.dropped(a, -1e6 * a, rng()).any()
    kept = method.dropped(a, -a, rng())
    assert set(kept.tolist()) <= {*a.tolist(), 0.0} and 400 < int((kept != 0).sum()) < 600
    half_way = build("estimator", {"name": "gradient_dropout", "blend": 0.25}).dropped(a, -1e6 * a, rng())
    assert torch.allclose(half_way, 0.75 * a)


@pytest.mark.slow
@pytest.mark.long
def test_gradient_dropout_in_a_run(base, tmp_path):
    with pytest.raises(RecipeError, match="needs an objective with a term 'kl'"):
        luthier.tune(**base, estimator="gradient_dropout", output_dir=str(tmp_path / "refused"))
    recipe = {
        **base,
        "tuner": "r_amt",
        "learning_rate": 1e-3,
        "max_steps": 20,
        "objective": "sft + kl",
        "estimator": "gradient_dropout",
    }
    report = luthier.tune(**recipe, output_dir=str(tmp_path / "a"))
    assert sum(report.losses[-4:]) < sum(report.losses[:4])
