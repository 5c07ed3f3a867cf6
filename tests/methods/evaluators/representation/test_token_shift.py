"""token_shift: nothing is shifted from itself, and a boosted token is exactly what is."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.evaluators.representation.token_shift import TokenShift, divergence, rank
from luthier.storage import files

ROWS = [{"id": str(i), "prompt": f"say {i}", "completions": ["x"]} for i in range(4)]


def test_ranks_and_divergences():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    assert rank(logits, torch.tensor([2, 0])).tolist() == [2, 1]
    assert float(divergence(logits, logits).abs().max()) == 0.0
    assert float(divergence(logits, logits.flip(-1))[0]) > 0


def test_a_model_is_not_shifted_from_itself(tiny_roles, tmp_path):
    metrics = TokenShift(n=4, max_new_tokens=6).run(tiny_roles, ROWS, tmp_path, "after")
    assert metrics["unshifted_tokens"] == 1.0 and metrics["shifted_tokens"] == 0.0
    assert metrics["shift_kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_boosted_token_is_what_is_shifted(tiny_roles, tmp_path, monkeypatch):
    """The policy writes one token of style in between; where it stands, and nowhere else, tokens are
    shifted.
    """
    plain, style = tiny_roles.policy.generate, 100

    def boosted(prompts, **how):
        def adjust(logits, prompts, responses):
            for row, response in enumerate(responses):
                if len(response) == 2:
                    logits[row, style] = 1e4
            return logits

        return plain(prompts, decoder=adjust, **how)

    monkeypatch.setattr(tiny_roles.policy, "generate", boosted)
    metrics = TokenShift(n=4, max_new_tokens=6).run(tiny_roles, ROWS, tmp_path, "after")
    curve = files.read_json(tmp_path / "token-shift.json")["by_position"]
    assert curve[2] == 1.0 and sum(curve) == 1.0
    assert metrics["unshifted_tokens"] + metrics["shifted_tokens"] == 1.0
