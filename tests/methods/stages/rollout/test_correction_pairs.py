"""correction_pairs: the cells off the diagonal of two attempts, and what dpo makes of them."""

from __future__ import annotations

import math

import numpy as np
import torch

from helpers.objectives import fitted
from helpers.rounds import scripted
from luthier.registry import build
from luthier.toy import bandit

ROWS = [{"id": str(k), "prompt": f"?{k % 10}:", "answer": str(k % 10)} for k in range(40)]


def reply(prompt: str, seed: int) -> str:
    """Right in half of the cases; the second attempt mends more than it spoils."""
    right = prompt[1]
    if "error" not in prompt:
        return right if seed % 2 else "x"
    first = prompt.split(":")[1][0]
    if first == right:
        return "y" if seed % 5 == 0 else right
    return right if seed % 2 else "z"


def test_pairs_are_the_cells_off_the_diagonal():
    roles, stage = scripted(reply), build("stage", {"name": "correction_pairs"})
    pairs = stage(ROWS, roles)
    attempts = []
    for prompts in (roles.policy.prompts[:40], roles.policy.prompts[40:]):
        attempts.append(prompts)
    first = np.array([p.split(":")[1][0] == p[1] for p in attempts[1]])
    measured = roles.stage_metrics
    assert measured["first"] == first.mean()
    assert round(40 * (measured["mended"] + measured["spoilt"])) == len(pairs)
    assert math.isclose(measured["second"] - measured["first"], measured["mended"] - measured["spoilt"])
    assert measured["mended"] > measured["spoilt"] > 0
    prompts = {row["id"]: row["prompt"] for row in ROWS}
    for pair in pairs:
        chosen, rejected = map(roles.text, pair["completions"])
        assert chosen == pair["answer"] != rejected and pair["scores"] == [1.0, 0.0]
        assert pair["prompt"] == prompts[pair["id"]]
    assert len(roles.dropped) == 40 - len(pairs)


def test_first_attempts_are_right_more_often_afterwards():
    """Dpo on such pairs begins at log 2, and moves what is said first to what is right."""
    base = torch.tensor([0.0, 1.0, 0.5])
    rows = bandit.pulled([[0, 1], [0, 2], [0, 1]], torch.tensor([1.0, 0.0, 0.0]))
    objective, roles = build("objective", "dpo"), bandit.roles_of(bandit.Arms(base))
    loss = bandit.average(objective, roles, rows)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    after = fitted(objective, roles, rows, steps=100)
    assert after.exp()[0] > base.softmax(-1)[0] + 0.2
