"""CLEAR: rows whose answer the model itself has no confidence in are left out, or corrected by the tuned
model.

The confidence of an answer is beta * O + (1 - beta) * S: O, how far it agrees with answers that the model
samples for the same prompt; S, what the model says when it is asked whether the answer is correct, unsure
or incorrect (1, 0.5, 0) (Chen and Mueller, 2024). Rows at or below the quantile `drop_share` leave
(Auto-Filter). With `writer`, a run tuned on what was left, that model answers every prompt anew, and an
answer takes the place of the row's where its own confidence is above `least` and above the old one's
(Auto-Correct). Departs: agreement is the overlap of words (F1), in the place of a model of entailment; the
new answer is judged by its confidence in the place of a comparison.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, text_of, without
from luthier.methods.stages.curate._answers import answers
from luthier.methods.stages.select._embedding import question
from luthier.registry import build, stage

QUESTION = (
    "Question:\n{question}\n\nProposed answer:\n{answer}\n\nIs the proposed answer: (A) correct, (B)"
    " incorrect or (C) are you not sure? Say one letter: "
)
WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}


@stage(
    example={"samples": 2, "max_new_tokens": 2},
    paper="arXiv:2403.12776",
    row="clear",
    requires=[COMPLETIONS, GENERATE],
    removes=[PAIRS, SCORES],
    use_when="answers of the rows are partly wrong, and no better model is at hand than the one to be tuned.",
    costs="`samples` answers and one question for each row; with `writer` twice that, and its answers.",
    covers="confidence by agreement and by asking, the filter at a quantile, correction by a tuned model.",
    omits="a model of entailment for agreement; several rounds by themselves (a plan's runs can be named).",
    tests=[
        "methods/stages/curate/test_clear.py::test_corrupted_answers_have_less_confidence",
        "methods/stages/curate/test_clear.py::test_nothing_is_changed_or_dropped_at_the_ends",
    ],
)
class Clear(Stage):
    """Rows above a quantile of confidence, corrected by `writer`; column `confidence`."""

    drop_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of the rows that leave; 0: none
    writer: str | None = None  # a tuned run that answers anew; null: nothing is corrected
    least: float = 0.8  # confidence above which a new answer is taken
    beta: Annotated[float, Field(ge=0, le=1)] = 0.7  # share of agreement in confidence
    samples: Annotated[int, Field(ge=1)] = 5  # answers with which one must agree
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of these
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # tokens of an answer

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        if not rows:
            return []
        sampled = answers(
            roles.policy, rows, roles, self.name, self.samples, self.max_new_tokens, self.temperature
        )
        current = [text_of(roles, row["completions"][0]) for row in rows]
        confidences = self.confidences(roles, rows, current, sampled)
        bound = float("-inf")
        if self.drop_share:
            bound = sorted(confidences)[max(0, round(self.drop_share * len(rows)) - 1)]
        corrected = [False] * len(rows)
        if self.writer is not None:
            tuned = build("role", {"name": "model", "model": self.writer}).play("writer", roles.policy)
            written = answers(tuned, rows, roles, self.name, 1, self.max_new_tokens, 0.0)
            new = [texts[0] for texts in written]
            for place, value in enumerate(self.confidences(roles, rows, new, sampled)):
                if value > self.least and value > confidences[place]:
                    current[place], confidences[place], corrected[place] = new[place], value, True
        chosen, out = [], []
        for place, row in enumerate(rows):
            if corrected[place] or confidences[place] > bound:
                chosen.append(place)
            if corrected[place]:
                turns = not isinstance(row["completions"][0], str)
                text: Any = current[place]
                completion = [{"role": "assistant", "content": text}] if turns else text
                row = {**without(row, "scores"), "completions": [completion]}
            out.append({**row, "confidence": confidences[place]})
        return self.drop(roles, out, chosen, f"their confidence is in the lower {self.drop_share:g}")

    def confidences(self, roles, rows, texts: list[str], sampled: list[list[str]]) -> list[float]:
        """beta * agreement + (1 - beta) * what the model says of each answer."""
        reflections = self.reflections(roles, rows, texts)
        values = []
        for answer, others, says in zip(texts, sampled, reflections, strict=True):
            agreement = sum(overlap(answer, other) for other in others) / len(others)
            values.append(self.beta * agreement + (1 - self.beta) * says)
        return values

    def reflections(self, roles: Any, rows: list[dict], texts: list[str]) -> list[float]:
        """What the model says of each answer, between 0 and 1: the mean worth of the letters."""
        letters, prompts = {}, []
        for letter in WORTH:
            letters[letter] = roles.renderer.tokenizer.encode(letter, add_special_tokens=False)[-1]
        for row, answer in zip(rows, texts, strict=True):
            text = QUESTION.replace("{question}", question(row)).replace("{answer}", answer)
            message: Any = [{"role": "user", "content": text}] if roles.renderer.note is None else text
            prompts.append(roles.renderer.prompt({"id": "clear", "prompt": message}))
        scores: dict[tuple[int, ...], float] = {}
        worth = torch.tensor([*WORTH.values()])

        def read(logits, prompts, responses):
            p = logits[:, [*letters.values()]].float().softmax(-1)
            for prompt, score in zip(prompts, (p @ worth.to(p.device)).tolist(), strict=True):
                scores[tuple(prompt)] = score
            return logits

        roles.policy.generate(
            prompts, seeds=[0] * len(prompts), max_new_tokens=1, temperature=0.0, decoder=read
        )
        return [scores[tuple(prompt)] for prompt in prompts]


def overlap(one: str, other: str) -> float:
    """F1 of words, 1 for equal texts."""
    if one.strip() == other.strip():
        return 1.0
    mine, theirs = Counter(one.lower().split()), Counter(other.lower().split())
    common = sum((mine & theirs).values())
    return 2 * common / max(1, sum(mine.values()) + sum(theirs.values()))
