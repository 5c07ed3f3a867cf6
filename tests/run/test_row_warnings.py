"""Settings and rows that run and yet learn little are told before the first step."""

from __future__ import annotations

import pytest
import torch

import luthier

PROMPTS = [f"say {i}:" for i in range(8)]


def notes(base, folder, **changes) -> str:
    return "\n".join(luthier.tune(base | {"evaluate": [], "eval_data": 0, **changes}, folder=folder).notes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"optim": ["clip"]}, "no transform of this chain"),
        ({"estimator": "mezo", "optim": "sgd"}, "clips nearly all of it"),
        ({"objective": "rwr"}, "this is plain SFT"),
        ({"objective": "kto"}, "count as good"),
    ],
)
def test_what_learns_little_is_told(base, tmp_path, changes, sentence):
    scored = [
        {"prompt": p, "completions": [" yes"], "scores": [0.1 + 0.1 * i]} for i, p in enumerate(PROMPTS)
    ]
    change = {"max_steps": 1, "data": scored, **changes}
    assert sentence in notes(base, tmp_path, **change)


def test_what_learns_is_not(base, tmp_path):
    told = notes(base, tmp_path / "a", optim=["clip", "adam"], max_steps=1)
    assert "no transform" not in told
    mezo = {"estimator": "mezo", "optim": {"name": "sgd", "max_grad_norm": 0}}
    assert "clips" not in notes(base, tmp_path / "b", max_steps=1, **mezo)
    assert "clips" not in notes(base, tmp_path / "c", max_steps=1, estimator="mezo", optim="adamw")


def test_a_task_that_is_known_is_told(base, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 8
    change = {"data": rows, "max_steps": 60, "learning_rate": 1e-2, "tuner": "full"}
    first = luthier.tune(base | change | {"evaluate": ["loss"], "eval_data": rows}, folder=tmp_path / "a")
    assert first.after["loss"] < 0.02 and "knows these answers" not in "".join(first.notes)
    again = {"model": first.folder, "evaluate": ["loss"], "eval_data": rows, "max_steps": 1}
    second = luthier.tune(base | change | again, folder=tmp_path / "b")
    assert "the model knows these answers already" in "".join(second.notes)


def test_logprobs_reads_rows_of_any_form(base, tmp_path):
    run = luthier.tune(base | {"evaluate": [], "eval_data": 0, "max_steps": 1}, folder=tmp_path)
    loaded = luthier.load(run.folder)
    canonical = loaded.logprobs([{"id": "a", "prompt": "1+1=", "completions": ["2"]}])
    assert torch.equal(loaded.logprobs([{"prompt": "1+1=", "completion": "2"}]), canonical)
    assert len(loaded.logprobs([{"question": "1+1=", "answer": "2"}])) > 0
    with pytest.raises(luthier.RecipeError):
        loaded.logprobs([{"nothing": "here"}])
