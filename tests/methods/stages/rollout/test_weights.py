"""draw_weights, scalarize: weights on the simplex in the prompt, and scores by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luthier.clock import Clock
from luthier.registry import build

NOBODY = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)


def test_weights_are_drawn_and_written():
    rows = [{"id": str(i), "prompt": "q"} for i in range(200)]
    stage = build("stage", {"name": "draw_weights", "names": ["short", "polite"]})
    out = list(stage(rows, NOBODY))
    assert all(sum(row["weights"]) == pytest.approx(1) for row in out) and out == list(stage(rows, NOBODY))
    assert 0.4 < sum(row["weights"][0] for row in out) / 200 < 0.6
    assert out[0]["prompt"] == "short {:.2f}, polite {:.2f}\nq".format(*out[0]["weights"])
    chat = [{"id": "c", "prompt": [{"role": "user", "content": "q"}]}]
    fixed = build("stage", {"name": "draw_weights", "fixed": [0.25, 0.75]})
    (row,) = fixed(chat, NOBODY)
    assert row["prompt"] == [{"role": "user", "content": "first 0.25, second 0.75\nq"}]


@pytest.mark.parametrize("form, score", [("linear", 0.65), ("product", 0.5**0.7), ("tchebycheff", 0.65)])
def test_scalarisations_by_hand(form, score):
    row = {"id": "r", "rewards": {"first": [0.5], "second": [1.0]}, "weights": [0.7, 0.3]}
    (out,) = build("stage", {"name": "scalarize", "form": form})([row], NOBODY)
    assert out["scores"] == pytest.approx([score])
