"""R-Tuning: the model is asked what it knows, and learns to say so.

The current model answers each question greedily; where the answer is right the row is certain, else
uncertain (Zhang et al., 2024). Targets become the reference answer, the question whether the model is sure,
and "I am sure." or "I am unsure." (`mode: append`); or a refusal where it is uncertain (`replace`).
`unsupervised` needs no reference: the half of the rows whose sampled answers vary most, by their entropy,
are uncertain. At inference the tuned model is asked the same question after its answer, and p(sure) ranks
answers.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, text_of, without
from luthier.methods.stages.curate._answers import answers
from luthier.registry import build, stage

ASK = "Are you sure you accurately answered the question based on your internal knowledge?"
SURE, UNSURE = "I am sure.", "I am unsure."
REFUSALS = (
    "I do not know the answer.",
    "I am not sure about that.",
    "That is beyond what I know.",
    "I cannot say that with certainty.",
)


@stage(
    example={"max_new_tokens": 2},
    paper="arXiv:2311.09677",
    row="r-tuning",
    requires=[COMPLETIONS, GENERATE],
    removes=[PAIRS, SCORES],
    use_when="a model answers what it does not know; questions with short answers are at hand.",
    costs="one greedy answer for each row; `unsupervised` takes `samples` of them.",
    covers="certain and uncertain rows by the model's own answers, or by their entropy; appended and replaced"
    " targets.",
    omits="few-shot prompts for base models: give rows that hold them.",
    tests=[
        "methods/stages/curate/test_r_tuning.py::test_labels_are_those_of_asking_the_model",
        "methods/stages/curate/test_r_tuning.py::test_a_model_that_knows_half_says_which",
    ],
)
class RTuning(Stage):
    """Rows whose targets say whether the model is sure; column `certain`."""

    mode: Literal["append", "replace"] = "append"  # how a target says it
    unsupervised: bool = False  # by the entropy of samples, without references
    reward: Any = "exact_match"  # which answers are right: a score of 0.5 or more
    samples: Annotated[int, Field(ge=2)] = 5  # answers of `unsupervised`
    temperature: Annotated[float, Field(gt=0)] = 0.7  # of these
    max_new_tokens: Annotated[int, Field(ge=1)] = 32  # tokens of an answer

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        if not rows:
            return []
        certain = self.entropies(rows, roles) if self.unsupervised else self.right(rows, roles)
        out = []
        for row, sure in zip(rows, certain, strict=True):
            target = self.target(row, text_of(roles, row["completions"][0]), sure, roles.clock)
            new = without(row, "scores")
            out.append({**new, "completions": [target], "certain": sure})
        return out

    def right(self, rows: list[dict], roles: Any) -> list[bool]:
        """Is the greedy answer of each row right?"""
        judge = build("reward", self.reward)
        written = answers(roles.policy, rows, roles, self.name, 1, self.max_new_tokens, 0.0)
        labels = []
        for row, (text,) in zip(rows, written, strict=True):
            reference = {"answer": text_of(roles, row["completions"][0]), **row}
            (score,) = judge.scores(reference, [text])
            labels.append(score >= 0.5)
        return labels

    def entropies(self, rows: list[dict], roles: Any) -> list[bool]:
        """Does each row have an entropy of answers in the lower half?"""
        written = answers(
            roles.policy, rows, roles, self.name, self.samples, self.max_new_tokens, self.temperature
        )
        values = []
        for texts in written:
            counts = Counter(text.strip() for text in texts).values()
            values.append(-sum(c / len(texts) * math.log(c / len(texts)) for c in counts))
        middle = sorted(values)[(len(values) - 1) // 2]
        return [value <= middle for value in values]

    def target(self, row: dict, answer: str, sure: bool, clock: Any) -> Any:
        """What the row teaches, in the form of its completion."""
        turns = not isinstance(row["completions"][0], str)
        if self.mode == "replace":
            text = answer
            if not sure:
                text = REFUSALS[clock.derive_seed("refusal", row["id"], at=0) % len(REFUSALS)]
            return [{"role": "assistant", "content": text}] if turns else text
        says = SURE if sure else UNSURE
        if not turns:
            return f"{answer} {ASK} {says}"
        return [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": ASK},
            {"role": "assistant", "content": says},
        ]
