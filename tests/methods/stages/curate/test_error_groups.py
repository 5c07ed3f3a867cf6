"""error_groups: groups by correctness, labels that weigh alike in each, splits of several models."""

from __future__ import annotations

import pytest
import torch

from helpers.rounds import Table, roles_of
from luthier.errors import RecipeError
from luthier.registry import build
from luthier.storage.files import write_rows
from luthier.storage.layout import ROWS

NAMES = ["bad", "good"]
LABELS = ["bad", "bad", "good", "good", "good"]
GUESSES = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 0.5], [1.0, 0.0]]  # of bad and good
DATA = [{"id": str(k), "prompt": [k], "completions": [label]} for k, label in enumerate(LABELS)]


def grouped(logits=GUESSES, **settings) -> list[dict]:
    table = Table(torch.tensor(logits))
    roles = roles_of(table, NAMES)
    table.architecture = type("Texts", (), {"encode_all": staticmethod(lambda rows, _: (list(rows), [], {}))})
    by_batch = roles.batch
    texts = lambda row: {**row, "completions": [[NAMES.index(one)] for one in row["completions"]]}
    roles.batch = lambda rows: by_batch([texts(row) for row in rows])
    stage = build("stage", {"name": "error_groups", "of": "policy", **settings})
    return list(stage(DATA, roles))


def test_groups_are_the_signs_of_correctness():
    rows = grouped()
    assert [row["source"] for row in rows] == ["right", "wrong", "right", "right", "wrong"]
    assert [row["completions"] for row in rows] == [row["completions"] for row in DATA]
    weights = [row["token_weights"][0][0] for row in rows]
    assert weights == pytest.approx([1.5, 1, 0.75, 0.75, 1])  # of mean 1 in each group, labels alike


def test_splits_of_earlier_models_stay(tmp_path):
    first = ["bad", "bad", "bad", "good", "good"]
    write_rows(tmp_path / ROWS, [{**row, "predictions": [p]} for row, p in zip(DATA, first, strict=True)])
    rows = grouped(earlier=str(tmp_path))
    assert [row["source"] for row in rows] == [
        "right-right",
        "right-wrong",
        "wrong-right",
        "right-right",
        "right-wrong",
    ]
    with pytest.raises(RecipeError, match="has no"):
        grouped(earlier=str(tmp_path / "nowhere"))


def test_no_better_than_chance_leaves_no_rows():
    assert len(grouped(chance=True)) == 5  # 3 of 5 are right
    assert grouped([[a, b] for b, a in GUESSES], chance=True) == []
