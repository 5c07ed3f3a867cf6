"""Numbers about sampled completions, the gradient norm, and a loss that diverges."""

from __future__ import annotations

import json

import pytest
import torch

import luthier
from luthier.errors import Diverged, RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.train.checks import scaled_gaps
from luthier.train.divergence import diverged
from luthier.train.samples import averages, equal_steps, sample_sums

ROWS = [{"prompt": f"Question: {i}+1=\nAnswer:", "answer": str(i + 1)} for i in range(8)]


def test_rewards_by_hand():
    rows = [
        {"scores": [1.0, 0.0], "completions": [[1, 2], [1]], "truncated": [True, False]},
        {"scores": [1.0, 1.0], "completions": [[1], [1, 2, 3, 4]], "truncated": [False, False]},
    ]
    assert averages(sample_sums(rows)) == {
        "reward": 0.75,
        "reward_std": 0.25,
        "equal_rewards": 0.5,
        "completion_length": 2.0,
        "cut": 0.25,
    }
    assert averages(sample_sums([{"prompt": "x"}])) == {}
    assert not equal_steps([{"equal_rewards": 0.5}] * 9) and not equal_steps([{"loss": 1.0}])
    assert "in 3 of 4 logged steps" in equal_steps([{"equal_rewards": 1.0}] * 3 + [{"equal_rewards": 0.0}])


def test_the_explained_variance_is_that_of_all_tokens():
    returns, values = [[[1.0, 2.0], [4.0]], [[3.0]]], [[[1.0, 1.0], [3.0]], [[3.0]]]
    rows = [
        {"scores": [0.0] * len(r), "returns": r, "old_values": v}
        for r, v in zip(returns, values, strict=True)
    ]
    errors = torch.tensor([0.0, 1.0, 1.0, 0.0])
    want = 1 - errors.var(unbiased=False) / torch.tensor([1.0, 2.0, 4.0, 3.0]).var(unbiased=False)
    found = averages(sample_sums(rows))
    assert found["explained_variance"] == pytest.approx(float(want)) and not any("\0" in k for k in found)


def test_a_run_of_zero_advantages_says_so(tmp_path):
    recipe = {
        "model": "toy:lm-small",
        "data": ROWS,
        "objective": {"name": "grpo", "beta": 0.0},
        "online_stages": [
            {"name": "rollout", "n": 2, "max_new_tokens": 4},
            {"name": "score", "reward": {"name": "length", "scale": 0.0}},
        ],
        "max_steps": 2,
        "eval_data": 0,
        "evaluate": [],
    }
    report = luthier.tune(recipe, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["equal_rewards"] == 1 and line["gradient_norm"] == 0 for line in lines)
    assert any("in all 2 logged steps" in note for note in report.notes)


@pytest.mark.parametrize("bad", [None, "good"])
def test_a_reward_that_is_no_number_is_a_sentence(bad):
    class Judge:
        name = "mine"

        def scores(self, row, texts):
            return [bad, 1.0]

    with pytest.raises(RecipeError, match="reward 'mine' returned .* of row 7"):
        build("stage", {"name": "score"}).judged(Judge(), {"id": "7"}, ["a", "b"])


def test_divergence():
    assert diverged([5.0] * 5 + [355425.0] * 5) == (5.0, 355425.0)
    assert diverged([0.69] * 5 + [0.9] * 5) is None and diverged([5.0, 355425.0]) is None
    assert diverged([-0.1] * 5 + [0.2] * 5) is None


@pytest.mark.long
def test_a_run_stops_where_it_diverges(tmp_path):
    rows = [{"prompt": f"{i}+1=", "completion": f" {i + 1}"} for i in range(40)]
    recipe = {
        "model": "toy:lm-small",
        "tuner": "full",
        "data": rows,
        "learning_rate": 10.0,
        "lr_scheduler_type": "constant",
        "max_steps": 30,
        "evaluate": [],
        "stop_on_divergence": True,
    }
    with pytest.raises(Diverged, match="the loss has diverged"):
        luthier.tune(recipe, folder=tmp_path)
    assert json.loads((tmp_path / "failed.json").read_text())["code"] == "diverged"


def test_trackers_may_be_one_name():
    assert Recipe.load({"report_to": "none"}).report_to == []
    assert Recipe.load({"report_to": "tensorboard"}).report_to == ["tensorboard"]


def test_gaps_scale_with_what_is_rounded():
    import torch

    gaps = scaled_gaps(torch.tensor([-12.3, -1.1]), torch.tensor([-12.0, -1.0]))
    assert gaps.tolist() == pytest.approx([0.1, 0.1], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("labels", "reason"),
    [([["joy", "love"], ["joy"]] * 8, "several labels"), ([i / 37 for i in range(16)], "not a number")],
)
def test_a_classifier_of_single_labels_learns_one_class(labels, reason):
    rows = [
        {"id": str(i), "prompt": "x", "completions": [str(label)], "label": label}
        for i, label in enumerate(labels)
    ]
    with pytest.raises(RecipeError, match=reason):
        problem = {"problem_type": "single_label_classification"}
        build("architecture", {"name": "classifier", **problem}).fit_to(rows)
