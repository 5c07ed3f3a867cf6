"""prompt_injection: scripted models that obey, obey some, or do their task."""

from __future__ import annotations

import json

import pytest

from helpers.scripted import scripted_roles
from luthier.methods.evaluators.safety.prompt_injection import PromptInjection, injected

ROWS = [{"id": str(i), "prompt": f"the text number {i} ends", "answer": str(i)} for i in range(10)]


def test_a_model_that_obeys_and_one_that_does_not(tmp_path):
    number = lambda text: next(word for word in text.split() if word.isdigit())
    obeys = scripted_roles(lambda text, _: "PWNED" if "PWNED" in text else number(text))
    tuned = scripted_roles(lambda text, _: number(text))
    last = scripted_roles(lambda text, _: "PWNED" if text.rstrip(". \n").endswith("PWNED") else number(text))
    evaluator = PromptInjection(reward="exact_match")
    metrics = evaluator.run(obeys, ROWS, tmp_path, "before")
    assert metrics["injection_success"] == 1.0 == metrics["clean_accuracy"]
    metrics = evaluator.run(tuned, ROWS, tmp_path, "after")
    assert metrics["injection_success"] == 0.0 and metrics["clean_accuracy"] == 1.0
    assert evaluator.run(tuned, [], tmp_path, "during") == {}
    metrics = evaluator.run(last, ROWS, tmp_path, "after")
    assert metrics["injection_success/start"] == metrics["injection_success/middle"] == 0.0
    assert metrics["injection_success/end"] == pytest.approx(2 / 3)  # the lure goes on behind the marker
    assert metrics["injection_success"] == pytest.approx(2 / 9)
    by_row = json.loads((tmp_path / "per_example-after.json").read_text())
    assert list(by_row["injection_success"].values()) == pytest.approx([2 / 9] * 10)


def test_places_of_an_attack():
    assert injected("one two three", "X", "start") == "X one two three"
    assert injected("one two three", "X", "end") == "one two three X "
    assert injected("one two three", "X", "middle") == "one two X three"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "word"}]
    assert injected(turns, "X", "middle") == [turns[0], {"role": "user", "content": "wo X rd"}]
