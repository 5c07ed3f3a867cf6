"""first: with the whole vocabulary is the forward kl."""

from __future__ import annotations

import json

import pytest

import luthier


def test_first_with_the_whole_vocabulary_is_the_forward_kl(base, tiny, tmp_path):
    teacher = {"roles": {"teacher": {"name": "model", "model": tiny}}}
    tuned = luthier.tune({**base, "learning_rate": 3e-3}, folder=tmp_path / "t").folder
    start = {**base, **teacher, "start": tuned, "max_steps": 1, "per_device_train_batch_size": 8}
    whole = luthier.tune({**start, "objective": "distill"}, folder=tmp_path / "a")
    stage = {"name": "teacher_top", "k": 262, "temperature": 1.0}
    kept = luthier.tune({**start, "objective": "first", "stages": [stage]}, folder=tmp_path / "b")
    assert kept.losses[0] == pytest.approx(whole.losses[0], rel=2e-3) and whole.losses[0] > 1e-3
    row = json.loads((tmp_path / "b" / "rows.jsonl").read_text().splitlines()[0])
    assert {len(place) for place in row["teacher_ids"][0]} == {262}
