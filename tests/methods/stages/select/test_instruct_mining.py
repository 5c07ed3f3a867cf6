"""instruct_mining: the fit, planted rows, and a rule made of short runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.methods.stages.select._short_run import ShortRun
from luthier.methods.stages.select.instruct_mining import fit, least_squares, mtld
from luthier.registry import build


def test_the_fit_is_least_squares():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 1e4, 1e-3])
    y = 0.5 - 2 * x[:, 0] + 1e-4 * x[:, 1] + 0.01 * torch.randn(40, generator=rng, dtype=torch.float64)
    full = np.concatenate([np.ones((40, 1)), x.numpy()], 1)
    expected = np.linalg.lstsq(full, y.numpy(), rcond=None)[0]
    coefficients, t = least_squares(x, y)
    assert np.allclose(coefficients.numpy(), expected, rtol=1e-6, atol=1e-9)
    rest = y.numpy() - full @ expected
    errors = np.sqrt(rest @ rest / 36 * np.diag(np.linalg.inv(full.T @ full)))
    assert np.allclose(t.numpy(), expected / errors, rtol=1e-4)
    rule = fit(x, y, 4.0)
    assert rule[3] == 0 and rule[1] == pytest.approx(-2, abs=0.02)


def test_planted_rows_rank_first():
    """True log loss = a + b f1: rows of high f1 (b below zero) get the lowest prediction."""
    rng = torch.Generator().manual_seed(0)
    features = torch.rand(300, 2, generator=rng, dtype=torch.float64)
    subsets = [torch.randperm(300, generator=rng)[:30] for _ in range(60)]
    means = torch.stack([features[s].mean(0) for s in subsets])
    y = 1.0 - 0.8 * means[:, 0] + 0.02 * torch.randn(60, generator=rng, dtype=torch.float64)
    rule = fit(means, y, 2.0)
    scores = rule[0] + features @ rule[1:]
    clean = features[:, 0] > 0.7
    pairs = scores[clean][:, None] < scores[~clean][None]
    assert float(pairs.double().mean()) > 0.9


def test_diversity_of_words():
    assert mtld("a b c d e f g h") == 8 and mtld("") == 0
    assert mtld("a a a a a a a a") < mtld("a b a c a d a e") < mtld("a b c d a b c e")


def test_a_rule_of_short_runs_finds_clean_rows(tiny_roles, tmp_path, monkeypatch):
    """Half of the rows have noise as answers, which a column marks: the rule leaves them out, and what it
    measured is read back.
    """
    rng = torch.Generator().manual_seed(0)
    rows = []
    for i in range(16):
        noise = "".join(chr(97 + int(c)) for c in torch.randint(26, (6,), generator=rng))
        rows.append(
            {
                "id": str(i),
                "prompt": f"say {i} ",
                "completions": [noise if i % 2 else "yes yes"],
                "clean": float(i % 2 == 0),
            }
        )
    target = [{"prompt": "say 99 ", "completion": "yes yes"}]
    settings = {
        "target": target,
        "indicators": ["clean", "output_length"],
        "subsets": 10,
        "rows_of_subset": 6,
    }
    stage = build("stage", {"name": "instruct_mining", "n": 8, "rate": 3e-3, **settings})
    sentences: list[str] = []
    tiny_roles.warn, tiny_roles.folder = sentences.append, tmp_path
    try:
        chosen = list(stage(rows, tiny_roles))
        assert {row["clean"] for row in chosen} == {1.0}
        monkeypatch.setattr(ShortRun, "epoch", None)  # nothing is trained
        again = stage.runs(tiny_roles, rows, [])
    finally:
        tiny_roles.folder = None
    assert len(again[1]) == 10 and any("log loss = " in s for s in sentences)
