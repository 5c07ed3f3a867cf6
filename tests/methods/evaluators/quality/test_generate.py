"""Answers beside references: right or wrong where that can be said, else how much they share."""

from __future__ import annotations

import json

import pytest

import luthier
from helpers.rows import SUMS
from luthier.methods.evaluators.quality._overlap import chrf, is_closed, rouge_l
from luthier.methods.evaluators.quality.generate import question
from luthier.report.numbers import generations

PAIRS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("A small dog.", "A small dog."),
    ("ab", "completely different words"),
    ("It rains, and it rains", "rain falls; it rains today"),
    ("", "something"),
]


def test_overlap_of_texts():
    assert chrf("a b c", "abc") == 1 and rouge_l("The cat", "the cat") == 1
    assert chrf("", "x") == 0 == rouge_l("", "x") and chrf("abc", "xyz") == 0
    assert rouge_l("a b c d", "a c e") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_they_are_what_others_compute(answer, reference):
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert 100 * chrf(answer, reference) == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score)
    theirs = scorer.score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, reference) == pytest.approx(theirs)


def test_which_answers_are_right_or_wrong():
    assert is_closed(["yes", "no", "no"]) and is_closed(["card_arrival"]) and not is_closed([])
    long = "a sentence of more than just six words"
    assert not is_closed([long, f"{long} too", f"{long} three"]) and is_closed([long] * 4)
    assert is_closed(['{"a": "one two three", "b": "four five", "c": [6, 7]}', '{"a": "x y z u v w a"}'])


def test_a_prompt_is_shown_by_its_last_question():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    last = {"role": "user", "content": [{"type": "text", "text": "And now?"}]}
    system = {"role": "system", "content": "Be brief."}
    assert question({"prompt": [system, *turns, last]}, "all") == "(2 earlier messages) And now?"
    assert question({"prompt": [system, last]}, "all") == "And now?"
    assert question({"prompt": "x"}, "all") == "x" and question({"prompt": ""}, "all") == "all"


@pytest.mark.long
def test_free_texts_are_neither_right_nor_wrong(tiny, tmp_path):
    rows = []
    for i, row in enumerate(SUMS[:6]):
        rows.append({"prompt": row["prompt"], "completion": f"{i} is what one could well say to that"})
    report = luthier.tune(
        model=tiny, data=rows, eval_data=rows, evaluate=["generate"], max_steps=0, output_dir=tmp_path / "r"
    )
    assert {"chrf", "rouge_l", "relative_length"} <= report.after.keys()
    assert "exact_match" not in report.after
    assert all(row["score_after"] is None for row in generations(report.folder))
    sample = json.loads((tmp_path / "r" / "samples-after.jsonl").read_text().splitlines()[0])
    assert sample["question"] == rows[0]["prompt"] and 0 <= sample["chrf"] <= 1
