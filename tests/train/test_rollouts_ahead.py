"""rollout with `ahead`: which weights sample which draw, what is saved of those that wait, and what the
objective makes of them.
"""

from __future__ import annotations

import json

import pytest

import luthier
from helpers.rows import SUMS
from luthier.errors import RecipeError
from luthier.methods.stages.rollout.rollout import Rollout

ROLLOUT = {"name": "rollout", "n": 4, "max_new_tokens": 4, "old": True}
SCORE = {"name": "score", "reward": {"name": "length", "of": "characters"}}


@pytest.fixture
def recipe(shallow) -> dict:
    return {
        "model": shallow,
        "data": SUMS,
        "dtype": "float32",
        "tuner": "lora",
        "objective": {"name": "grpo", "beta": 0.0},
        "online_stages": [ROLLOUT, SCORE],
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "save_steps": 1,
        "evaluate": [],
        "eval_data": 0,
    }


def ahead(recipe: dict, draws: int) -> dict:
    """The recipe with samples that wait for so many draws."""
    return {**recipe, "online_stages": [{**ROLLOUT, "ahead": draws}, SCORE]}


def watched(monkeypatch) -> list[tuple[int, tuple[str, ...], float]]:
    """Of each rollout: the step of its chance, its rows, and a sum that tells the policy's weights."""
    calls: list[tuple[int, tuple[str, ...], float]] = []
    real = Rollout.__call__

    def watching(self, rows, roles):
        mark = sum(float(p.detach().double().abs().sum()) for p in roles.tuner.parameters().values())
        calls.append((roles.clock.step, tuple(row["id"] for row in rows), mark))
        return real(self, rows, roles)

    monkeypatch.setattr(Rollout, "__call__", watching)
    return calls


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_draw_is_sampled_by_the_weights_of_so_many_draws_before(recipe, tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    luthier.tune(recipe, folder=tmp_path / "now")
    now = list(calls)
    calls.clear()
    luthier.tune(ahead(recipe, 2), folder=tmp_path / "ahead")
    weights = [mark for _, _, mark in now]
    assert len({*weights}) == 5
    assert [call[:2] for call in calls] == [call[:2] for call in now], "the same rows, of the same chance"
    assert [mark for _, _, mark in calls[:3]] == [weights[0]] * 3
    assert len({mark for _, _, mark in calls}) == 3, "nothing is sampled that is not trained on"
    lines = [logged(tmp_path / name) for name in ("now", "ahead")]
    assert [line["staleness"] for line in lines[1]] == [0, 1, 2, 2, 2]
    assert lines[0][0]["loss"] == lines[1][0]["loss"] and "staleness" not in lines[0][0]
    # on fresh samples the loss is the sum of advantages, 0: stale ones are weighted
    assert max(abs(line["loss"]) for line in lines[0]) < 1e-5 < max(abs(line["loss"]) for line in lines[1])


@pytest.mark.parametrize("num_iterations, stop", [(1, 2), (2, 3)])
@pytest.mark.long
def test_what_waits_is_saved(recipe, tmp_path, num_iterations, stop):
    recipe = ahead(recipe, 1) | {"num_iterations": num_iterations}
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    luthier.tune(recipe, folder=tmp_path / "parts", stop_at=stop)
    assert luthier.tune(recipe, folder=tmp_path / "parts").losses == whole.losses


def test_stale_samples_need_the_samplers_logprobs(recipe, tmp_path):
    bare = {key: value for key, value in ROLLOUT.items() if key != "old"}
    with pytest.raises(RecipeError, match="ahead"):
        luthier.tune({**recipe, "online_stages": [{**bare, "ahead": 1}, SCORE]}, folder=tmp_path)
