"""score: scores are of texts whatever form they have; several rewards add up by weight; a reward that gives
no numbers is named; the price of leaving the reference.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.stages import rollout, rows_with
from luthier.errors import RecipeError
from luthier.methods.stages._base import pick, text_of
from luthier.registry import build


def test_scores_are_of_texts_whatever_form_they_have(roles):
    ids = roles.renderer.tokenizer("7").input_ids + roles.renderer.stop_ids[:1]
    turns = [{"role": "assistant", "content": "7"}]
    row = {"id": "a", "prompt": "3+4=", "answer": "7", "completions": ["7", ids, turns, "8"]}
    assert [text_of(roles, c) for c in row["completions"]] == ["7", "7", "7", "8"]
    (out,) = build("stage", "score")([row], roles)
    assert out["scores"] == [1.0, 1.0, 1.0, 0.0] and "rewards" not in out


def test_several_rewards_add_up_by_weight(roles):
    both = [{"name": "exact_match"}, {"name": "exact_match", "ignore_case": True}]
    stage = build("stage", {"name": "score", "reward": both, "reward_weights": [1.0, 0.5]})
    row = {"id": "a", "prompt": "", "answer": "Yes", "completions": ["Yes", "yes", "no"]}
    (out,) = stage([row], roles)
    assert out["scores"] == [1.5, 0.5, 0.0]
    assert out["rewards"] == {"exact_match-0": [1.0, 0.0, 0.0], "exact_match-1": [1.0, 1.0, 0.0]}
    assert pick(out, [1])["rewards"] == {"exact_match-0": [0.0], "exact_match-1": [1.0]}
    with pytest.raises(RecipeError, match="2 weights for 1 rewards"):
        build("stage", {"name": "score", "reward_weights": [1, 2]})
    with pytest.raises(RecipeError, match="at least one reward"):
        build("stage", {"name": "score", "reward": []})


@pytest.mark.parametrize("wrong", [[1.0], [1.0, math.nan]])
def test_a_reward_that_gives_no_numbers_is_named(roles, monkeypatch, wrong):
    stage = build("stage", "score")
    monkeypatch.setattr(type(stage.reward[0]), "scores", lambda self, row, texts: wrong)
    with pytest.raises(RecipeError, match="'exact_match' returned .* of row a"):
        list(stage([{"id": "a", "prompt": "", "answer": "1", "completions": ["1", "2"]}], roles))


def test_the_price_of_leaving_the_reference(roles):
    """scores - kl_coef * log ratio by hand; a large coefficient decides which is best."""
    rows = rollout(n=4, max_new_tokens=3)(rows_with({"answer"}, 3), roles)
    rows = [{**r, "scores": [0.0, 1.0, 2.0, 3.0]} for r in rows]
    rng = torch.Generator().manual_seed(1)
    shift = {
        k: p.detach() + 0.05 * torch.randn(p.shape, generator=rng)
        for k, p in roles.tuner.parameters().items()
    }
    was = roles.reference
    roles.players["reference"] = roles.policy.as_role("reference", lambda: roles.tuner.using(shift))
    out = list(build("stage", {"name": "kl_penalty", "kl_coef": 50.0})(rows, roles))
    picked = list(build("stage", "best")(out, roles))
    for row, new, kept in zip(rows, out, picked, strict=True):
        hand = []
        for k in range(4):
            batch = roles.batch([pick(row, [k])])
            with torch.no_grad():
                gap = roles.policy.logprobs(batch).sum() - roles.reference.logprobs(batch).sum()
            hand.append(float(row["scores"][k] - 50 * gap))
        assert new["scores"] == pytest.approx(hand, abs=1e-2)
        assert kept["completions"] == [row["completions"][max(range(4), key=hand.__getitem__)]]
    roles.players["reference"] = was
