"""The best evaluation's weights are kept; a run that gets no better ends early, a resumed one alike."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.errors import RecipeError

ROWS = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(12)]
RISING = {"learning_rate": 0.3, "lr_scheduler_type": "constant"}  # the held-out loss soon rises


@pytest.fixture
def recipe(base):
    return base | {
        "data": ROWS,
        "eval_data": 0.3,
        "evaluate": ["loss"],
        "max_steps": 8,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        **RISING,
    }


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines]


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def test_the_run_ends_with_its_best_weights(recipe, tmp_path):
    report = luthier.tune(recipe, folder=tmp_path)
    measured = losses(tmp_path)
    assert len(measured) == 8 and measured[-1] > min(measured)
    assert report.after["loss"] == pytest.approx(min(measured), abs=1e-6)
    assert not (tmp_path / "best").exists()
    assert any(
        note.startswith(f"the weights of step {1 + measured.index(min(measured))} are used")
        for note in report.notes
    )


def test_patience_ends_the_run(recipe, tmp_path):
    report = luthier.tune(recipe | {"early_stopping_patience": 2, "max_steps": 40}, folder=tmp_path)
    measured = losses(tmp_path)
    best = measured.index(min(measured))
    assert len(measured) == best + 3 < 40
    assert report.stats["steps"] == len(measured) == len(report.losses)
    assert report.after["loss"] == pytest.approx(min(measured), abs=1e-6)
    assert any(note.startswith("stopped early at step") for note in report.notes)
    again = luthier.tune(recipe | {"early_stopping_patience": 2, "max_steps": 40}, folder=tmp_path)
    assert again.after == report.after


def test_a_paused_run_ends_alike(recipe, tmp_path):
    recipe = recipe | {"early_stopping_patience": 3, "save_steps": 2}
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    luthier.tune(recipe, folder=tmp_path / "parts", stop_at=3)
    parts = luthier.tune(recipe, folder=tmp_path / "parts")
    assert parts.after == whole.after and parts.losses == whole.losses
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluations_come_with_checkpoints_where_no_steps_are_set(recipe, tmp_path):
    luthier.tune(recipe | {"eval_steps": None, "save_steps": 4}, folder=tmp_path)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if "eval" in line
    ]
    assert steps == [4, 8]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"metric_for_best_model": "bleu"}, "measured by none of the evaluators"),
        ({"evaluate": []}, "measured: nothing"),
        ({"early_stopping_patience": 0}, "early_stopping_patience"),
    ],
)
def test_what_cannot_tell_the_best_is_refused(changes, words, recipe, tmp_path):
    with pytest.raises(RecipeError, match=words):
        luthier.tune(recipe | changes, folder=tmp_path)
