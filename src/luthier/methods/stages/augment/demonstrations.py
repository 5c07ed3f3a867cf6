"""Demonstrations: every prompt gets the most alike rows with their answers before it, chosen by BM25.

The k rows that share most rare words with a prompt stand before it, the nearest last, never the row itself
nor another with the same prompt (Yuan et al., 2023, for code). `choose: random` is the control. Where they
would be longer than `letters` together with the prompt, the least alike leave. Tuning on such rows is
supervised in-context learning; evaluating on them is few-shot prompting. Departs: lengths are letters, not
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, text_of
from luthier.methods.stages.select._bm25 import BM25
from luthier.methods.stages.select._embedding import question
from luthier.registry import Range, stage


@stage(
    paper="arXiv:2308.01240",
    row="instruct-llm-code-eval",
    requires=[COMPLETIONS],
    example={"k": 2},
    use_when="a model is to be used, or compared, with examples in its prompt, near ones above all.",
    costs="word counts of all rows, and a longer prompt.",
    covers="few-shot prompts with the k best rows by BM25, or random ones, within a length; low-rank"
    " tuning and the"
    " scores of answers are there anyway.",
    omits="the four code tasks and ten models of the study; memory and time of each sample.",
    tests=[
        "methods/stages/augment/test_demonstrations.py::test_they_are_the_best_by_the_formula",
        "methods/stages/augment/test_demonstrations.py::test_the_least_alike_leave_first",
        "methods/stages/augment/test_demonstrations.py::test_a_model_that_copies_gains_by_near_ones",
    ],
)
class Demonstrations(Stage):
    """Prompts as text get question and answer of other rows before them; of a conversation its last turn."""

    asks_model = False

    k: Annotated[int, Field(ge=0), Range(1, 8)] = 3  # demonstrations of each row
    choose: Literal["bm25", "random"] = "bm25"  # how they are chosen
    letters: Annotated[int, Field(ge=1)] = 6000  # of a prompt with its demonstrations, at most
    template: str = "{prompt}\n{answer}\n\n"  # a demonstration

    def __post_init__(self):
        if "{prompt}" not in self.template or "{answer}" not in self.template:
            raise RecipeError("stage 'demonstrations': template needs {prompt} and {answer}")

    def __call__(self, rows, roles):
        rows = list(rows)
        if rows and not any(row.get("completions") for row in rows):
            raise RecipeError("stage 'demonstrations' needs rows with answers, but none has a completion")
        questions = [question(row) for row in rows]
        texts = []
        for row, words in zip(rows, questions, strict=True):
            answer = text_of(roles, best(row)) if row.get("completions") else ""
            texts.append(self.template.replace("{prompt}", words).replace("{answer}", answer))
        index = BM25(questions) if self.choose == "bm25" else None
        for place, row in enumerate(rows):
            order = self.order(place, questions, index, roles)
            usable = [k for k in order if questions[k] != questions[place] and rows[k].get("completions")]
            chosen = fitting([texts[k] for k in usable[: self.k]], self.letters - len(questions[place]))
            yield {**row, "prompt": behind("".join(reversed(chosen)), row["prompt"])}

    def order(self, place: int, questions: Sequence[str], index: BM25 | None, roles: Any) -> list[int]:
        """Places of rows, the most alike first."""
        if index is not None:
            return index.top(questions[place], len(questions))
        rng = roles.clock.rng("demonstrations", place, at=0)
        return torch.randperm(len(questions), generator=rng).tolist()


def fitting(texts: Sequence[str], letters: int) -> list[str]:
    """The first texts that fit into so many letters together."""
    out = []
    for text in texts:
        letters -= len(text)
        if letters < 0:
            break
        out.append(text)
    return out


def best(row: dict) -> Any:
    """The completion with the highest score, or the first."""
    scores = row.get("scores") or [0.0] * len(row["completions"])
    return row["completions"][max(range(len(scores)), key=scores.__getitem__)]


def behind(text: str, prompt: Any) -> Any:
    """A prompt with a text before its last turn's words."""
    if isinstance(prompt, str):
        return text + prompt
    *before, last = prompt
    return [*before, {**last, "content": f"{text}{last['content']}"}]
