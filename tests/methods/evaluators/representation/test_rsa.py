"""rsa: is pearsons correlation of likenesses; sees which layers changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import luthier
from helpers.rows import recipe_of
from luthier.methods.evaluators.representation.rsa import correlation, cosines


def test_rsa_is_pearsons_correlation_of_likenesses():
    torch.manual_seed(0)
    a, b = torch.randn(9, 5), torch.randn(9, 5)
    assert correlation(cosines(a), cosines(a)) == pytest.approx(1.0)
    pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    like = lambda h: [float(torch.cosine_similarity(h[i], h[j], dim=0)) for i, j in pairs]
    assert correlation(cosines(a), cosines(b)) == pytest.approx(np.corrcoef(like(a), like(b))[0, 1], abs=1e-5)


@pytest.mark.long
def test_rsa_sees_which_layers_changed(tiny):
    report = luthier.tune(
        **recipe_of(tiny)
        | {
            "tuner": {"name": "telly", "k": 3},
            "evaluate": ["rsa", "cost"],
            "learning_rate": 1e-2,
        },
        output_dir=None,
    )
    assert all(report.before[f"rsa/{i}"] == pytest.approx(1) for i in range(4))
    assert (
        all(report.after[f"rsa/{i}"] == pytest.approx(1) for i in range(3)) and report.after["rsa/3"] < 0.9999
    )
