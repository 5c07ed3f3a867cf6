"""brain_alignment: the ridge regression by brute force, planted and absent responses, surprisal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.evaluators._base import read
from luthier.methods.evaluators.representation._prompt_states import prompt_states
from luthier.methods.evaluators.representation.brain_alignment import (
    PENALTIES,
    BrainAlignment,
    correlations,
    ridge,
)


def solved(x, y, new, penalty):
    """Ridge regression with an intercept, by its normal equations."""
    z = x - x.mean(0)
    weights = torch.linalg.solve(
        z.T @ z + penalty * torch.eye(z.shape[1], dtype=z.dtype), z.T @ (y - y.mean(0))
    )
    return (new - x.mean(0)) @ weights + y.mean(0)


def test_the_penalty_is_that_of_leave_one_out():
    rng = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for n in (15, 6))
    y = x @ torch.randn(4, 2, generator=rng, dtype=torch.float64)
    y = y + torch.tensor([0.1, 4.0]) * torch.randn(15, 2, generator=rng, dtype=torch.float64)
    ours = ridge(x, y, new)
    for k in range(2):
        errors = []
        for penalty in PENALTIES:
            # leave-one-out with the intercept's share of the leverage, at the centring of all rows
            z = x - x.mean(0)
            hat = z @ torch.linalg.inv(z.T @ z + penalty * torch.eye(4, dtype=z.dtype)) @ z.T + 1 / 15
            residual = (y[:, k] - hat @ y[:, k]) / (1 - hat.diagonal())
            errors.append(float(residual.square().mean()))
        penalty = PENALTIES[int(np.argmin(errors))]
        assert torch.allclose(ours[:, k], solved(x, y[:, k : k + 1], new, penalty)[:, 0], atol=1e-8)
        # that shortcut is what leaving each row out in turn gives
        keep = [[i for i in range(15) if i != left] for left in range(15)]
        brute = [float(y[i, k] - solved(x[rest], y[rest, k : k + 1], x[i : i + 1], penalty)[0, 0])
                 for i, rest in enumerate(keep)]  # fmt: skip
        assert float(np.square(brute).mean()) == pytest.approx(min(errors), rel=1e-6)


def test_correlations_are_numpys():
    a, b = torch.randn(9, 2).double(), torch.randn(9, 2).double()
    b[:, 1] = 3.0
    assert float(correlations(a, b)[0]) == pytest.approx(np.corrcoef(a[:, 0], b[:, 0])[0, 1])
    assert float(correlations(a, b)[1]) == 0.0


def test_planted_and_shuffled_responses():
    """Responses that are a linear map of the states reach the ceiling that their noise sets; shuffled ones
    reach nothing.
    """
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(300, 12, generator=rng, dtype=torch.float64)
    signal = x @ torch.randn(12, 20, generator=rng, dtype=torch.float64)
    signal = signal / signal.std(0)
    y = signal + torch.randn(300, 20, generator=rng, dtype=torch.float64)
    folds = torch.arange(300) % 5
    method = BrainAlignment(ceiling=2**-0.5)
    assert method.score(x, y, folds) == pytest.approx(1.0, abs=0.05)
    assert abs(method.score(x, y[torch.randperm(300, generator=rng)], folds)) < 0.1


def test_the_layer_that_made_the_responses_and_surprisal(roles, tmp_path):
    letters = "abcdefgh"
    rows = []
    for i in range(60):
        prompt = f"{letters[i % 8]}{letters[i // 8]}{i}"
        rows.append({"id": f"{i:02}", "prompt": prompt, "completions": [letters[i * 5 % 8]]})
    names, layers = prompt_states(roles, rows)
    z = (layers[2] - layers[2].mean(0)) / layers[2].std(0).clamp(min=1e-9)
    made = z @ torch.randn(z.shape[1], 6, generator=torch.Generator().manual_seed(0)).double()
    responses = dict(zip(names, made.tolist(), strict=True))
    stats = read(roles, rows, None, {"loss"})
    for row in rows:
        row["responses"], row["reading_time"] = responses[row["id"]], 2 * stats[row["id"]].loss + 1
    metrics = BrainAlignment().run(roles, rows, tmp_path, "after")
    assert metrics["brain_score"] > 0.5 > metrics["brain_shuffled"]
    assert metrics["brain_score"] - metrics["brain_score/2"] < 0.05
    assert metrics["surprisal_correlation"] == pytest.approx(1.0)
    batch = roles.batch([rows[0]])
    assert stats["00"].loss == pytest.approx(-float(roles.policy.outputs(batch).logprobs.sum()), abs=1e-5)
    assert (
        BrainAlignment().run(roles, [{"id": "x", "prompt": "a", "completions": []}], tmp_path, "after") == {}
    )
    rows[0]["responses"] = [1.0]
    with pytest.raises(RecipeError, match="different lengths"):
        BrainAlignment().run(roles, rows, tmp_path, "after")
