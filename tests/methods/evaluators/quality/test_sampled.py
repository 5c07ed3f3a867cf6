"""sampled: the mean over answers, and which prompts can teach."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from helpers.models import make_tokenizer
from luthier.clock import Clock
from luthier.registry import build


def test_means_and_shares_over_prompts(tmp_path):
    tokenizer = make_tokenizer()
    answers = {"a": ["1", "1"], "b": ["1", "2"], "c": ["3", "2"]}

    def generate(prompts, **how):
        assert how["n"] == 2 and how["temperature"] == 1.0 and len({*how["seeds"]}) == len(prompts)
        return [[tokenizer.encode(text) for text in answers[tokenizer.decode(p)]] for p in prompts]

    renderer = SimpleNamespace(
        stop_ids=[1], prompt=lambda row: tokenizer.encode(row["prompt"]), answer=tokenizer.decode
    )
    roles = SimpleNamespace(policy=SimpleNamespace(generate=generate), renderer=renderer, clock=Clock())
    rows = [{"id": name, "prompt": name, "answer": "1"} for name in answers]
    found = build("evaluator", {"name": "sampled", "samples": 2}).run(roles, rows, tmp_path, "after")
    assert found == {
        "sampled_reward": pytest.approx(0.5),
        "solved": pytest.approx(2 / 3),
        "mixed": pytest.approx(1 / 3),
    }
    by_row = json.loads((tmp_path / "per_example-after.json").read_text())["sampled_reward"]
    assert by_row == {"a": 1.0, "b": 0.5, "c": 0.0}
    later = build("evaluator", {"name": "sampled", "samples": 2, "skip": 1, "n": 1})
    assert later.run(roles, rows, tmp_path, "after")["sampled_reward"] == 0.5
