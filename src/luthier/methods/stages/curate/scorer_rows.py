"""Rows for a small scorer of responses (Cappy): pairs of an instruction and a response with a number from 0
to 1, made without labels.

A row's own answer is worth 1, the answer of another row of the same task 0, and what a model has written its
ROUGE-L with the answer, the best where there are several. An encoder with a regression head learns them
(architecture `classifier` with `problem_type: regression`, objective `sft`, which is then the squared error).
The run is a reward (`classifier`): it chooses among labels, or among samples of a model that stays as it is
(decoder `best_of_n`).
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Annotated

from pydantic import Field

from luthier.methods.evaluators.quality._overlap import rouge_l
from luthier.methods.formats._base import ANSWER, COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, text_of, without
from luthier.methods.stages.select._embedding import question
from luthier.registry import stage


@stage(
    paper="arXiv:2311.06720",
    row="cappy",
    requires=[COMPLETIONS, ANSWER],
    provides=[COMPLETIONS],
    removes=[SCORES, PAIRS],
    use_when="a small scorer is to choose among the answers of a large model that cannot be tuned: rows with"
    " `answer` and sampled completions (stage `rollout`), for a regression.",
    costs="ROUGE-L of each completion; a row for each, and for the answer and each mismatched one.",
    covers="the three kinds of rows with 1, 0 and ROUGE-L; training by regression, choice of labels and"
    " best-of-n by the scorer.",
    omits="the published scorer and its 160 million rows.",
    tests=[
        "methods/stages/curate/test_scorer_rows.py::test_numbers_by_hand",
        "methods/stages/curate/test_scorer_rows.py::test_a_scorer_chooses_better_samples",
    ],
)
class ScorerRows(Stage):
    """Rows with two `texts`, the instruction and the response; their completion is the number."""

    mismatched: Annotated[int, Field(ge=0)] = 1  # answers of other rows, for each row
    task: str = "task"  # column that says which rows are of one task; without it all are

    def __call__(self, rows, roles):
        rows, tasks = list(rows), defaultdict(list)
        for row in rows:
            tasks[row.get(self.task)].append(row)
        out = []
        for place, row in enumerate(rows):
            own, others = answers(row), []
            for other in tasks[row.get(self.task)]:
                if other is not row and not set(answers(other)) & set(own):
                    others.append(answers(other)[0])
            chance = random.Random(roles.clock.derive_seed("scorer_rows", row["id"], place))
            pairs = [(own[0], 1.0)]
            for text in chance.sample(others, min(self.mismatched, len(others))):
                pairs.append((text, 0.0))
            for completion in row["completions"]:
                text = text_of(roles, completion)
                pairs.append((text, max(rouge_l(text, answer) for answer in own)))
            asks = question(row)
            for k, (text, number) in enumerate(pairs):
                if text.strip():
                    columns = {"texts": [asks, text], "prompt": f"{asks}\n{text}"}
                    score = f"{number:.6g}"
                    out.append({**without(row), **columns, "id": f"{row['id']}/{k}", "completions": [score]})
        return out


def answers(row: dict) -> list[str]:
    """The right answers of a row."""
    answer = row["answer"]
    if isinstance(answer, (list, tuple)):
        return [str(text) for text in answer]
    return [str(answer)]
