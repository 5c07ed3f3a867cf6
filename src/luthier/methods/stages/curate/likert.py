"""Scores each row on a scale of 1 to 6 by what a model expects to say: sum of k * p(k).

The scorers of DEITA for complexity (of the instruction) and quality (of the answer) are models trained to
say one of six digits; the score is the mean of the digits under the softmax of their logits alone (Liu et
al., 2024). Any model can be asked; the policy itself is by default. Departs: no scorer is shipped, and the
training of one is a plain `sft` run on rated rows.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, text_of
from luthier.methods.stages.select._embedding import question
from luthier.registry import build, stage

QUALITY = (
    "Rate how good the answer is, from 1 (wrong or useless) to 6 (right, complete and clear). Say one"
    " digit.\n\nQuestion:\n{question}\n\nAnswer:\n{answer}\n\nRating: "
)
COMPLEXITY = (
    "Rate how hard the question is to answer, from 1 (simple) to 6 (very complex). Say one digit.\n\n"
    "Question:\n{question}\n\nRating: "
)


@stage(
    paper="arXiv:2312.15685",
    row="deita",
    requires=[COMPLETIONS, GENERATE],
    use_when="rows have no scores, and a model is at hand that tells good ones from bad ones; twice, for"
    " quality and `of: complexity`, before `diverse`.",
    costs="reading each row once, and one token.",
    covers="scores as expectations over six digits; with `diverse`, the score-first and diversity-aware"
    " choice.",
    omits="scorers trained on evolved instructions and answers.",
    tests=[
        "methods/stages/select/test_choice.py::test_a_certain_digit_is_the_score",
        "methods/stages/select/test_choice.py::test_diverse_is_the_brute_force_filter",
    ],
)
class Likert(Stage):
    """Column `column`: the expected digit, from 1 to `most`."""

    column: str = "quality"  # name of the column that is written
    # what is asked, with {question} and {answer}; `quality` and `complexity` are prompts of their own
    of: str = "quality"
    most: Annotated[int, Field(ge=2, le=9)] = 6  # the highest digit
    model: str | None = None  # who is asked (a folder, a run, a hub name); null: the policy
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows that are read together

    def __call__(self, rows, roles):
        rows = list(rows)
        who = roles.policy
        if self.model is not None:
            who = build("role", {"name": "model", "model": self.model}).play("scorer", roles.policy)
        template = {"quality": QUALITY, "complexity": COMPLEXITY}.get(self.of, self.of)
        out = []
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            prompts = []
            for row in some:
                answer = text_of(roles, row["completions"][0])
                prompts.append(self.prompt(roles, template, question(row), answer))
            for row, score in zip(some, self.expected(roles, who, prompts), strict=True):
                out.append({**row, self.column: score})
        return out

    def prompt(self, roles: Any, template: str, asks: str, answer: str) -> list[int]:
        """The question as the model reads it."""
        text = template.replace("{question}", asks).replace("{answer}", answer)
        message: Any = text
        if roles.renderer.note is None:
            message = [{"role": "user", "content": text}]
        return roles.renderer.prompt({"id": "likert", "prompt": message})

    def expected(self, roles: Any, who: Any, prompts: list[list[int]]) -> list[float]:
        """The mean digit of each prompt."""
        tokens = []
        for digit in range(1, self.most + 1):
            ids = roles.renderer.tokenizer.encode(str(digit), add_special_tokens=False)
            if not ids:
                raise RecipeError(f"stage 'likert': the tokenizer has no token for the digit {digit}")
            tokens.append(ids[-1])
        scores: dict[tuple[int, ...], float] = {}

        def read(logits, prompts, responses):
            digits = torch.arange(1, self.most + 1, device=logits.device)
            means = (logits[:, tokens].float().softmax(-1) * digits).sum(-1)
            for prompt, mean in zip(prompts, means.tolist(), strict=True):
                scores[tuple(prompt)] = mean
            return logits

        who.generate(prompts, seeds=[0] * len(prompts), max_new_tokens=1, temperature=0.0, decoder=read)
        return [scores[tuple(prompt)] for prompt in prompts]
