"""Retrieval against fine-tuning: four arms, base and tuned, each with and without a passage before the
question.

Every prompt is answered closed book and with what a retriever puts before it. After training both gains and
their interaction are said with intervals over rows: (tuned with - tuned without) - (base with - base
without). Above 0 each makes the other worth more; below, they bring the same facts (Balaguer et al., 2024).
Passages come from a column of the rows, or by BM25 from `documents`. Departs: scored by a reward, not by a
judge's rubric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep, paired_change, per_example_file
from luthier.methods.stages.select._bm25 import BM25
from luthier.registry import Metric, build, evaluator
from luthier.storage import files


@evaluator(
    metrics=[
        Metric("closed_book", "score without passages", unit="%", better="higher"),
        Metric("open_book", "score with passages", unit="%", better="higher"),
        Metric("retrieval_gain", "gain by passages", unit="%"),
        Metric("retrieval_interaction", "gain by passages, tuned minus base", unit="%"),
        Metric("retrieval_interaction_low", "low end of its interval", unit="%"),
        Metric("retrieval_interaction_high", "high end of its interval", unit="%"),
    ],
    paper="arXiv:2401.08406",
    row="rag-vs-ft",
    requires=[GENERATE],
    use_when="you must decide whether to tune on documents, to retrieve from them, or both.",
    costs="two answers to each of `n` prompts, before and after.",
    covers="the four arms on the same rows, gains and their interaction with intervals, BM25 or passages"
    " of the"
    " rows.",
    omits="questions generated from documents, embeddings for retrieval, and rubrics by a judge.",
    tests=[
        "methods/evaluators/quality/test_retrieval_arms.py::test_four_arms",
        "methods/evaluators/quality/test_retrieval_arms.py::test_a_retriever_that_finds_nothing",
        "methods/evaluators/quality/test_retrieval_arms.py::test_bm25_by_its_formula",
    ],
)
class RetrievalArms(Evaluator):
    """`closed_book`, `open_book`, `retrieval_gain`; after training `retrieval_interaction`, its interval."""

    documents: list[str] | None = None  # passages to retrieve from; the rows' own column if not given
    column: str = "context"  # of rows, with the passage that belongs to each
    passages: Annotated[int, Field(ge=1)] = 1  # how many of `documents` stand before a question
    template: str = "{context}\n\n{prompt}"  # a prompt with its passages
    reward: Any = "exact_match"  # the reward that scores answers
    n: Annotated[int, Field(ge=1)] = 48  # prompts
    max_new_tokens: Annotated[int, Field(ge=1)] = 48  # tokens per answer

    def __post_init__(self):
        if "{context}" not in self.template or "{prompt}" not in self.template:
            raise RecipeError("evaluator 'retrieval_arms': template needs {context} and {prompt}")

    @property
    def active_requires(self):
        return self.requires | build("reward", self.reward).requires

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row["prompt"]]
        if self.documents is None:
            rows = [row for row in rows if row.get(self.column)]
        rows = rows[: self.n]
        if not rows:
            return {}
        arms = {"closed_book": rows, "open_book": self.with_passages(rows)}
        scores = {name: self.scores(roles, rows, arm) for name, arm in arms.items()}
        gains = {row: value - scores["closed_book"][row] for row, value in scores["open_book"].items()}
        scores["retrieval_gain"] = gains
        keep(folder, when, **scores)
        metrics = {name: sum(column.values()) / len(column) for name, column in scores.items()}
        path = per_example_file(folder, "before")
        before = files.read_object(path).get("retrieval_gain") if path.is_file() else None
        if when != "after" or before is None or before.keys() != gains.keys():
            return metrics
        change = paired_change(before, gains)
        return {
            **metrics,
            "retrieval_interaction": change.difference,
            "retrieval_interaction_low": change.low,
            "retrieval_interaction_high": change.high,
        }

    def with_passages(self, rows: Sequence[dict]) -> list[dict]:
        """The same rows, passages before each question."""
        index = None if self.documents is None else BM25(self.documents)
        out = []
        for row in rows:
            question = row["prompt"] if isinstance(row["prompt"], str) else str(row["prompt"][-1]["content"])
            if index is None:
                context = str(row[self.column])
            else:
                context = "\n".join(index.documents[k] for k in index.top(question, self.passages))
            text = self.template.replace("{context}", context).replace("{prompt}", question)
            if isinstance(row["prompt"], str):
                out.append({**row, "prompt": text})
            else:
                *earlier, last = row["prompt"]
                out.append({**row, "prompt": [*earlier, {**last, "content": text}]})
        return out

    def scores(self, roles: Any, rows: Sequence[dict], arm: Sequence[dict]) -> dict[str, float]:
        """Row id -> the score of the answer to the arm's prompt."""
        judge = build("reward", self.reward)
        written = roles.policy.generate(
            [roles.renderer.prompt(row) for row in arm],
            rows=arm,
            seeds=[0] * len(arm),
            temperature=0.0,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        out = {}
        for row, (ids,) in zip(rows, written, strict=True):
            out[str(row["id"])] = float(judge.scores(row, [roles.renderer.answer(ids)])[0])
        return out
