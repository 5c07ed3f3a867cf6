"""ilf: refinements by feedback, and the choice among them."""

from __future__ import annotations

import pytest

from helpers.rounds import scripted
from luthier.methods.stages.rollout.ilf import ILF

WORDS = ["red", "green", "blue", "grey"]
ROWS = [
    {"id": str(k), "prompt": f"list {k}", "completions": [" ".join(WORDS)], "feedback": f"without {word}"}
    for k, word in enumerate(WORDS * 5)
]


def without_one(prompt: str, seed: int) -> str:
    """An answer without some word."""
    return " ".join(word for word in WORDS if word != WORDS[seed // 7 % 4])


class Reader(ILF):
    """It can tell, with some doubt, whether the word is gone."""

    def likely(self, row, texts, question, roles):
        word = row["feedback"].split()[-1]
        return [0.9 if word not in text else 0.2 for text in texts]


def success(rows: list[dict], roles) -> float:
    gone = [row["feedback"].split()[-1] not in roles.text(row["completions"][0]) for row in rows]
    return sum(gone) / len(gone)


def test_chosen_refinements_succeed_more_often():
    roles = scripted(without_one)
    chosen, first = Reader(n=8)(ROWS, roles), Reader(n=1)(ROWS, roles)
    assert success(chosen, roles) > success(first, roles) + 0.2
    assert roles.policy.prompts[0].startswith(
        "list 0\n\nAnswer:\nred green blue grey\n\nFeedback:\nwithout red"
    )
    for row, before in zip(chosen, ROWS, strict=True):
        assert row["prompt"] == before["prompt"] and set(row) == {*before, "scores", "truncated"}


def test_the_choice_is_the_argmax_of_the_mean(monkeypatch):
    table = {"a": [0.9, 0.1, 0.2], "b": [0.5, 0.6, 0.4], "c": [0.1, 0.9, 0.1]}
    questions = ("one?", "two?", "three?")

    def likely(self, row, texts, question, roles):
        return [table[text][questions.index(question)] for text in texts]

    monkeypatch.setattr(ILF, "likely", likely)
    roles = scripted(lambda prompt, seed: "abc"[seed % 3])
    (row,) = ILF(n=3, questions=questions)(ROWS[:1], roles)
    assert roles.text(row["completions"][0]) == "b" and row["scores"] == pytest.approx([0.5])
    assert roles.stage_metrics["chosen"] == pytest.approx(0.5)
    assert roles.stage_metrics["refined"] == pytest.approx(sum(map(sum, table.values())) / 9)


def test_one_refinement_is_taken_as_it_is():
    roles = scripted(without_one, lambda character: -0.5)
    (row,) = ILF(n=1)(ROWS[:1], roles)
    assert roles.text(row["completions"][0]) == roles.policy.reply(
        "", roles.clock.derive_seed("rollout", 0, "0", 0)
    )
    assert row["scores"] == pytest.approx([1 / (1 + 2.718281828**0.5)])  # " yes" is a character longer
