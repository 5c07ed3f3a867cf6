"""reward_list: the double sum, and pairs as objective `reward`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Encoded


def batch_of(rows):
    return collate(
        rows, lambda r: Encoded(r["prompt"], r["completions"], [[True] * len(c) for c in r["completions"]])
    )


LISTS = [
    {"id": "a", "prompt": [7, 8], "completions": [[10, 11], [12], [13, 9], [14]], "scores": [1, 0, 1, 0]},
    {"id": "b", "prompt": [7], "completions": [[20, 11], [12], [9]], "scores": [0, 0, 0]},
]
TWO = [{"id": "c", "prompt": [7, 8, 9], "completions": [[10, 11], [12, 13, 14]], "scores": [1.0, 0.0]}]


def test_the_loss_is_the_double_sum(judge):
    batch = batch_of(LISTS)
    losses = build("objective", "reward_list").loss(judge, batch)
    values = batch.last(judge.policy.outputs(batch).values)
    right, wrong = values[[0, 2]], values[[1, 3]]
    by_hand = -F.logsigmoid(right[:, None] - wrong).sum() / (2 * 2)
    torch.testing.assert_close(losses[0], by_hand)
    assert losses[1] == 0.0, "answers that are all wrong say nothing"
    losses.sum().backward()


def test_one_right_and_one_wrong_answer_are_a_pair(judge):
    losses = []
    for name in ("reward_list", "reward"):
        losses.append(build("objective", name).loss(judge, batch_of(TWO)))
    torch.testing.assert_close(losses[0], losses[1])
