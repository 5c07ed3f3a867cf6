"""prompt_ensemble: Jensen's inequality, calibration by its definition, and an overconfident classifier."""

from __future__ import annotations

import json
import math

import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.prompt_ensemble import (
    PromptEnsemble,
    calibration_error,
    combined,
    sure,
)


def test_calibration_error_by_definition():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        sureness = torch.rand(50, generator=rng, dtype=torch.float64).tolist()
        right = (torch.rand(50, generator=rng) < 0.5).tolist()
        total = 0.0
        for k in range(10):
            some = [i for i, p in enumerate(sureness) if k / 10 <= p < (k + 1) / 10]
            if some:
                mean = sum(sureness[i] for i in some) / len(some)
                total += len(some) / 50 * abs(mean - sum(right[i] for i in some) / len(some))
        assert calibration_error(list(zip(sureness, right, strict=True)), 10) == pytest.approx(
            total, abs=1e-9
        )


def test_the_mean_loses_no_row():
    table = (3 * torch.randn(500, 4, 5, generator=torch.Generator().manual_seed(0)).double()).softmax(-1)
    for one in table:
        ensemble = combined(one, "mean")
        assert float(ensemble.sum()) == pytest.approx(1)
        assert (-ensemble.log() <= -one.log().mean(0) + 1e-12).all()


def test_votes_and_the_surest():
    table = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.0, 0.1, 0.9]], dtype=torch.float64)
    assert int(combined(table, "majority").argmax()) == 0
    assert float(combined(table, "majority").sum()) == pytest.approx(1)
    assert torch.equal(combined(table, "maximum"), table[2])
    assert int(combined(table, "mean").argmax()) == 0


def test_an_overconfident_classifier():
    """Of sharp and noisy templates the mean is better calibrated; of equal ones it is the same."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (400,), generator=rng)
    signal = torch.nn.functional.one_hot(truth, 3).double()
    noisy = (6 * (signal[:, None] + torch.randn(400, 4, 3, generator=rng).double())).softmax(-1)
    for table, better in ((noisy, True), (noisy[:, :1].expand(-1, 4, -1), False)):
        ensemble = [sure(combined(one, "mean"), int(right)) for one, right in zip(table, truth, strict=True)]
        singles = []
        for k in range(4):
            answers = [sure(one[k], int(right)) for one, right in zip(table, truth, strict=True)]
            singles.append(calibration_error(answers, 10))
        single = sum(singles) / 4
        gap = single - calibration_error(ensemble, 10)
        assert gap > 0.1 if better else gap == pytest.approx(0, abs=1e-9)


def test_of_a_language_model(roles, tmp_path):
    rows = [
        {"id": str(i), "prompt": f"{i}?", "completions": ["yes", "no"], "scores": [i % 2, 1 - i % 2]}
        for i in range(6)
    ]
    metrics = PromptEnsemble().run(roles, rows, tmp_path, "before")
    assert metrics["ensemble_nll"] <= metrics["single_nll"]
    one = PromptEnsemble(templates=["{prompt}"]).run(roles, rows, tmp_path, "before")
    for name in ("nll", "ece", "option_accuracy"):
        assert one[f"ensemble_{name}"] == pytest.approx(one[f"single_{name}"], abs=1e-9)
    losses = json.loads((tmp_path / "per_example-before.json").read_text())["ensemble_nll"]
    assert sum(losses.values()) / 6 == pytest.approx(one["ensemble_nll"]) and one["single_nll"] > math.log(
        1.1
    )
    with pytest.raises(RecipeError, match="needs {prompt}"):
        PromptEnsemble(templates=["no place"])
