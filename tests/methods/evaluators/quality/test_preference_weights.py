"""preference_weights: simulated judges, the symmetry of pairs, and rows that like one property."""

from __future__ import annotations

import json

import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.preference_weights import PreferenceWeights, fit, similarity, table


def simulated(seed: int, pairs: int = 400, size: int = 6):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, generator=rng, dtype=torch.float64)
    x = torch.randint(-1, 2, (pairs, size), generator=rng).double()
    y = (torch.rand(pairs, generator=rng, dtype=torch.float64) < torch.sigmoid(x @ weights)).double()
    return weights, x, y


def test_weights_of_simulated_judges():
    """Signs of all that matter, and 90 % intervals that hold the truth about as often."""
    covered, total = 0, 0
    for seed in range(50):
        weights, x, y = simulated(seed)
        mode, covariance = fit(x, y)
        strong = weights.abs() > 0.5
        assert torch.equal(mode[strong].sign(), weights[strong].sign())
        lines = table([str(k) for k in range(6)], mode, covariance).values()
        for line, weight in zip(lines, weights.tolist(), strict=True):
            covered += line["low"] <= weight <= line["high"]
            total += 1
    assert 0.8 <= covered / total <= 0.97


def test_nothing_where_nothing_is_planted():
    """Of judges that choose by chance about one interval in ten leaves 0 out."""
    outside = 0
    for seed in range(50):
        _, x, _ = simulated(seed)
        y = (torch.rand(400, generator=torch.Generator().manual_seed(1000 + seed)) < 0.5).double()
        lines = table([str(k) for k in range(6)], *fit(x, y)).values()
        outside += sum(line["low"] > 0 or line["high"] < 0 for line in lines)
    assert outside / 300 < 0.16


def test_swapping_the_answers():
    _, x, y = simulated(0)
    mode, covariance = fit(x, y)
    swapped, same = fit(-x, 1 - y)
    assert torch.allclose(mode, swapped, atol=1e-9) and torch.allclose(covariance, same, atol=1e-9)
    assert torch.allclose(torch.sigmoid(x @ mode), 1 - torch.sigmoid(-x @ mode))
    assert similarity(mode, mode) == 1.0 > similarity(mode, -mode)


def test_rows_that_like_length(roles, tmp_path):
    """What rows prefer is read from them, whatever the model does; a model is unlike its opposite."""
    rows = []
    for i in range(24):
        sides = ["yes yes yes", "no no?" if i % 2 else "no"]
        rows.append({"id": f"{i:02}", "prompt": f"{i}: ", "completions": sides, "scores": [1.0, 0.0]})
    metrics = PreferenceWeights().run(roles, rows, tmp_path, "before")
    lines = json.loads((tmp_path / "preference-weights-before.json").read_text())
    assert lines["rows"].keys() == {"words", "question"}
    assert lines["rows"]["words"]["low"] > 0 and lines["rows"]["words"]["preferred"] > 0.7
    assert lines["rows"]["question"]["weight"] < 0
    assert metrics["preference_weight/words"] == lines["policy"]["words"]["weight"]
    assert "preference_weight/code" not in metrics  # no answer has any
    worse = [{**row, "scores": [0.0, 1.0]} for row in rows]
    other = PreferenceWeights().run(roles, worse, tmp_path, "after")
    gap = 2 - metrics["preference_similarity"] - other["preference_similarity"]
    assert gap > 0.1 and abs(metrics["preference_similarity"] - other["preference_similarity"]) > 0.1


def test_properties_of_the_rows(roles, tmp_path):
    rows = []
    for i in range(6):
        properties = [{"kind": 1}, {"kind": 0}]
        row = {"id": str(i), "prompt": f"{i}", "completions": ["a", "b"], "scores": [1.0, 0.0]}
        rows.append({**row, "properties": properties})
    metrics = PreferenceWeights(column="properties").run(roles, rows, tmp_path, "before")
    assert metrics.keys() == {"preference_weight/kind", "preference_similarity"}
    with pytest.raises(RecipeError, match="properties of each completion"):
        PreferenceWeights(column="nothing").run(roles, rows, tmp_path, "before")
