"""A verifier of answers from retrieved knowledge (KALMV): is the knowledge of no use (A), is it of use and
the answer wrong all the same (B), or is the answer right (C)?

The probabilities of the three letters are averaged over several wordings of the question, on which the
verifier was tuned alike (stage `verifier_rows`).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.rewards.judges._judge import plain
from luthier.methods.rewards.models._models import ModelReward, loaded
from luthier.registry import Column, reward

KNOWLEDGE = Column(
    "knowledge",
    says="text that was retrieved for the row (column `knowledge`)",
    example=("Paris is the capital of France.", "Water boils at 100 degrees."),
)
LETTERS = ("A", "B", "C")
OPTIONS = (
    "A: the knowledge does not help\nB: the knowledge helps, the answer is wrong\nC: the answer is right"
)
WORDINGS = (
    "Check the answer against the knowledge.",
    "Which of the three statements below is true of this answer?",
    "Someone looked something up and answered. Say whether either of them went wrong.",
    "Verify the answer to the question with what was retrieved.",
    "Does the knowledge help with the question, and is the answer right?",
)


def verifier_prompt(wording: int, row: dict, text: str) -> str:
    """The question about an answer in one of the wordings."""
    return (
        f"{WORDINGS[wording]}\n{OPTIONS}\n\nQuestion: {plain(row['prompt'])}\nKnowledge: {row['knowledge']}\n"
        f"Answer: {text}\n\nLetter:"
    )


@reward(
    paper="arXiv:2310.12836",
    row="kalmv",
    requires=[KNOWLEDGE],
    use_when="answers rest on retrieved text, and a small tuned verifier is to say whether the text or the"
    " answer is at fault; decoder `verified_retrieval` then does something about it.",
    costs="five readings of each answer by the verifier; fewer with `wordings`.",
    covers="the three options, five wordings and their mean; automatic labels by stage `verifier_rows`; the"
    " loop of retrieving again and writing again by decoder `verified_retrieval`.",
    omits="retrieval itself: rows bring their passages; knowledge graphs.",
    tests=[
        "methods/rewards/judges/test_knowledge_verifier.py::test_the_ensemble_is_the_mean",
        "methods/stages/curate/test_verifier_rows.py::test_labels_of_crafted_rows",
        "methods/decoders/search/test_verified_retrieval.py::test_the_loop_ends_and_accepts",
        "methods/decoders/search/test_verified_retrieval.py::test_verified_answers_are_right_more_often",
    ],
)
class KnowledgeVerifier(ModelReward):
    """The probability of C."""

    wordings: Annotated[int, Field(ge=1, le=len(WORDINGS))] = len(WORDINGS)  # how many are averaged

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        return [options[2] for options in self.options(row, texts)]

    def options(self, row: dict, texts: list[str]) -> list[list[float]]:
        """Of each text, the probabilities of A, B and C."""
        self.column(row, "knowledge")
        total = [[0.0] * len(LETTERS) for _ in texts]
        for wording in range(self.wordings):
            questions = [verifier_prompt(wording, row, text) for text in texts]
            for place, each in enumerate(self.ask(questions)):
                total[place] = [a + b / self.wordings for a, b in zip(total[place], each, strict=True)]
        return total

    def ask(self, questions: list[str]) -> list[list[float]]:
        """How likely each letter is as the reply to each question, of the three."""
        roles, rows = loaded(self.model, self.dtype), []
        for place, text in enumerate(questions):
            # as `verifier_rows` has them
            replies = [f" {letter}" for letter in LETTERS]
            rows.append({"id": str(place), "prompt": text, "completions": replies})
        out: list[list[float]] = []
        for i in range(0, len(rows), self.batch_size):
            batch = roles.batch(rows[i : i + self.batch_size])
            with torch.no_grad(), roles.policy.eval_mode():
                logs = batch.sums(roles.policy.logprobs(batch).float())
            out += logs.view(-1, len(LETTERS)).softmax(-1).tolist()
        return out
