"""terms: are trained together and one term is backprop."""

from __future__ import annotations

import pytest

import luthier


@pytest.mark.long
@pytest.mark.parametrize("name", ["pcgrad", "min_norm", "pareto_da"])
def test_terms_are_trained_together_and_one_term_is_backprop(base, tmp_path, name):
    recipe = {
        **base,
        "objective": "sft + 0.5*dft",
        "estimator": name,
        "learning_rate": 3e-3,
        "max_steps": 16,
        "per_device_train_batch_size": 16,
    }
    report = luthier.tune(recipe, folder=tmp_path / "a")
    assert report.losses[-1] < report.losses[0]
    alone = [luthier.tune({**base, "estimator": e}, folder=tmp_path / e).losses for e in (name, "backprop")]
    assert alone[0] == alone[1]
