"""iou: rewards of boxes by hand, and a policy that writes boxes learns them."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.rewards.verifiers.iou import boxes_in, iou
from luthier.registry import build
from luthier.toy import bandit

RIGHT = [[0, 0, 10, 10], [20, 20, 30, 30]]


def score(text: str, **settings) -> float:
    judge = build("reward", {"name": "iou", "confidence": True, **settings})
    return judge.scores({"id": "r", "boxes": RIGHT}, [text])[0]


def test_boxes_are_read():
    text = 'a [1, 2, 3.5, 4] {"box": [0,0,10,10], "confidence": 0.25} (1,2,3,4,0.5) [1, 2, 3]'
    assert boxes_in(text) == [((1, 2, 3.5, 4), 1.0), ((0, 0, 10, 10), 0.25), ((1, 2, 3, 4), 0.5)]


def test_iou_is_torchvisions():
    ops = pytest.importorskip("torchvision.ops")
    rng = torch.Generator().manual_seed(0)
    corners = torch.rand(6, 2, 2, generator=rng).sort(1).values.reshape(6, 4)
    theirs = ops.box_iou(corners, corners)
    for i in range(6):
        for j in range(6):
            assert iou(tuple(corners[i].tolist()), tuple(corners[j].tolist())) == pytest.approx(
                float(theirs[i, j]), abs=1e-6
            )


def test_rewards_of_boxes_by_hand():
    both = "[0,0,10,10] [20,20,30,30]"
    assert score(both) == 2.0, "perfect boxes, sure of them"
    assert score(both + " [50,50,60,60,0.4]") == pytest.approx(1 + (1 + 1 + 0.6) / 3), "one false box"
    assert score("[0,0,10,10,0.9]") == pytest.approx(0.5 + 0.9), "one right box is missed"
    assert score("[0,0,10,5,1.0]", least=0.6) == 0.0, "half of a box is no match"
    assert score("[0,0,10,8] [20,20,30,30]") == pytest.approx((0.8 + 1) / 2 + 1)
    assert score("[0,0,10,10] [0,0,10,10]") == pytest.approx(0.5 + 0.5), "a right box is matched once"
    assert score("none") == 0.0 and score("[3,3,1,1]") == 0.0


def test_a_policy_that_writes_boxes_learns_them():
    """Arms are texts with a box; GRPO's advantages have zero mean in their group, and the reward rises."""
    texts = [f"[{x},{x},{x + 10},{x + 10}]" for x in range(-6, 7, 2)]
    judge = build("reward", {"name": "iou", "least": 0.0})
    reward = torch.tensor(judge.scores({"id": "r", "boxes": [[0, 0, 10, 10]]}, texts))
    objective = build("objective", {"name": "grpo", "beta": 0.0})
    course = bandit.study(
        objective, reward, torch.zeros(len(texts)), steps=200, rows=2, n=4, fresh_every=1, width=0.5
    )
    assert course.reward[-1] > 0.9 > course.reward[0]
    batch = bandit.batch_of(bandit.pulled([[0, 3, 5], [1, 2, 6]], reward))
    advantages = objective.advantages(None, batch).view(2, 3)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(2), atol=1e-5, rtol=0)
