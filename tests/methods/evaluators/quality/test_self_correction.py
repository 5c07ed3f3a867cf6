"""self_correction: the identity, its fixed point, and models whose habits are known."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from helpers.models import make_tokenizer
from luthier.clock import Clock
from luthier.methods.evaluators.quality.self_correction import SelfCorrection, decompose


def test_the_identity_of_both_accuracies():
    rng = random.Random(0)
    for _ in range(50):
        outcomes = [[(rng.random() < 0.6, rng.random() < 0.5) for _ in range(4)] for _ in range(7)]
        m = decompose(outcomes)
        acc, cl, cs = m["first_accuracy"], m["confidence_level"], m["critique_score"]
        assert m["second_accuracy"] == pytest.approx(acc * cl + (1 - acc) * cs, abs=1e-9)


def test_the_same_answer_again_is_half():
    same = [[(True, True), (False, False)], [(True, True), (True, True)]]
    m = decompose(same)
    assert m["confidence_level"] == 1.0 and m["critique_score"] == 0.0
    assert m["self_correction_score"] == pytest.approx(0.5)
    assert "self_correction_score" not in decompose([[(True, True)]])


def roles_of(second) -> SimpleNamespace:
    """A model that answers 7 and 8 in turn, and looks again as `second` says of its first answer."""
    tokenizer = make_tokenizer()

    def generate(prompts, n, **how):
        answers = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            looks_again = "look" in text
            several = [second(text[1])] if looks_again else ["7", "8"]
            answers.append([tokenizer.encode(answer) for answer in several])
            assert n == len(several)
        return answers

    renderer = SimpleNamespace(
        stop_ids=[1], prompt=lambda row: tokenizer.encode(row["prompt"]), answer=tokenizer.decode
    )
    return SimpleNamespace(policy=SimpleNamespace(generate=generate), renderer=renderer, clock=Clock())


@pytest.mark.parametrize(
    ("habit", "confidence", "critique"),
    [
        (lambda first: first, 1.0, 0.0),  # insists
        (lambda first: "7", 1.0, 1.0),  # mends
        (lambda first: {"7": "8", "8": "7"}[first], 0.0, 1.0),  # changes its mind
    ],
)
def test_models_that_insist_and_that_mend(habit, confidence, critique, tmp_path):
    rows = [{"id": str(i), "prompt": "q", "answer": "7"} for i in range(3)]
    evaluator = SelfCorrection(samples=2, ask="look")
    metrics = evaluator.run(roles_of(habit), rows, tmp_path, "after")
    assert metrics["first_accuracy"] == 0.5
    assert metrics["confidence_level"] == confidence and metrics["critique_score"] == critique
