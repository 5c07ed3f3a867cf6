"""Rows for a verifier of answers from retrieved knowledge (KALMV), labelled without people.

A completion that has the row's answer is right (C); where it has not but the knowledge does, the answer went
wrong (B); where neither has, the retrieval did (A). Each row has one of several wordings, drawn by chance.
Trained on with `sft`; reward `knowledge_verifier` reads the result.
"""

from __future__ import annotations

import random

from luthier.methods.formats._base import ANSWER, COMPLETIONS, PAIRS, SCORES
from luthier.methods.rewards.judges.knowledge_verifier import KNOWLEDGE, WORDINGS, verifier_prompt
from luthier.methods.rewards.rules.f1 import words
from luthier.methods.stages._base import Stage, text_of, without
from luthier.registry import stage


@stage(
    paper="arXiv:2310.12836",
    row="kalmv",
    requires=[COMPLETIONS, ANSWER, KNOWLEDGE],
    provides=[COMPLETIONS],
    removes=[SCORES, PAIRS],
    use_when="a verifier of retrieval and answers is to be trained, and rows have what was retrieved, sampled"
    " completions and right answers.",
    costs="comparing words; a row for each completion.",
    covers="the labels by the right answers and their aliases, wordings by chance.",
    tests=["methods/stages/curate/test_verifier_rows.py::test_labels_of_crafted_rows"],
)
class VerifierRows(Stage):
    """A row for each completion: the verifier's question, and its letter."""

    def __call__(self, rows, roles):
        for place, row in enumerate(rows):
            answers = row["answer"] if isinstance(row["answer"], (list, tuple)) else [row["answer"]]
            for k, completion in enumerate(row["completions"]):
                text = text_of(roles, completion)
                letter = label(text, str(row["knowledge"]), [str(answer) for answer in answers])
                chance = random.Random(roles.clock.derive_seed("verifier_rows", row["id"], place, k))
                prompt = verifier_prompt(chance.randrange(len(WORDINGS)), row, text)
                columns = {"id": f"{row['id']}/{k}", "prompt": prompt, "completions": [f" {letter}"]}
                yield {**without(row, "knowledge"), **columns}


def label(text: str, knowledge: str, answers: list[str]) -> str:
    """A: retrieval failed; B: the answer did; C: right."""
    if contains(text, answers):
        return "C"
    return "B" if contains(knowledge, answers) else "A"


def contains(text: str, answers: list[str]) -> bool:
    """Does a text have one of the answers, as whole words, without case, punctuation and articles?"""
    spaced = f" {' '.join(words(text))} "
    for answer in answers:
        phrase = " ".join(words(answer))
        if phrase and f" {phrase} " in spaced:
            return True
    return False
