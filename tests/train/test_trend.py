"""What is said of a loss at the end of a run."""

from __future__ import annotations

import pytest

from luthier.train.trend import checkpoints_of, held_out_trend, logged_trend, sentence


@pytest.mark.parametrize(
    ("points", "word"),
    [
        ([(25, 2.0), (50, 1.8), (75, 1.7), (100, 1.65)], "falling"),
        ([(25, 2.0), (50, 1.8), (75, 1.795), (100, 1.79)], "flat"),
        ([(25, 2.0), (50, 1.8), (75, 1.9), (100, 2.1)], "rising"),
        ([(25, 0.01), (50, 0.002), (75, 0.0012), (100, 0.001)], "flat"),
    ],
)
def test_held_out_losses(points, word):
    trend = held_out_trend(points)
    assert trend is not None and trend.word == word
    assert held_out_trend(points[:2]) is None
    assert checkpoints_of(100) == {25, 50, 75} and checkpoints_of(7) == set()


def test_logged_losses_and_rewards():
    noise = [0.1, -0.1] * 8
    assert logged_trend([2.0 + x for x in noise]).word == "flat"
    assert logged_trend([2.0 - 0.05 * i for i in range(16)]).word == "falling"
    assert logged_trend([1.0] * 15) is None


def test_advice():
    rising = held_out_trend([(25, 1.8), (50, 1.7), (75, 1.9), (100, 2.1)])
    text = sentence(rising, "held-out loss", "num_train_epochs", 10, 100, False)
    assert "lowest after step 50" in text and "num_train_epochs=5)" in text
    falling = held_out_trend([(25, 2.0), (50, 1.8), (75, 1.7), (100, 1.65)])
    assert "max_steps=200" in sentence(falling, "held-out loss", "max_steps", 100, 100, False)
    reward = logged_trend([0.05 * i for i in range(16)])
    assert "still rising" in sentence(reward, "reward", "max_steps", 16, 16, True)
    assert "max_steps=32" in sentence(reward, "reward", "max_steps", 16, 16, True)
