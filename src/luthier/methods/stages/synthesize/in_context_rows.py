"""Generative tabular learning: each row of a table is asked about after some rows of the same table, with
their answers, so that a model learns to predict from rows in its context.

Rows come in the format `table`. As in the paper every sample is a description of the table, `n` rows with
answers, and the row that is asked about; the loss is on its answer alone. Departs: the share of samples
without names of columns (`anonymous`) is a setting; one layout of rows, sentences, where the paper also
writes Markdown tables.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.formats._tables import FEATURES, TARGET, draw, question, same_question
from luthier.methods.stages._base import Stage
from luthier.registry import Range, stage


@stage(
    example={"n": 2},
    paper="arXiv:2310.07338",
    row="tabfm-gtl",
    requires=[FEATURES, TARGET],
    removes=[FEATURES, TARGET],  # the prompt is no longer that of the row alone
    use_when="rows are those of tables and the model is to predict a column from a few rows in its prompt.",
    costs="no model is read; prompts are `n` rows longer.",
    covers="rows of tables as text and back, any column as the target, descriptions, missing values, rows in"
    " the context with and without names of columns, loss on the answers, ROC AUC by the likelihood of"
    " labels (evaluator `table_auc`).",
    omits="Markdown tables; digits weighted by their place, and NMAE of numbers; a model trained on hundreds"
    " of tables, or at toy scale on many, and the comparison with boosted trees.",
    tests=[
        "methods/stages/synthesize/test_in_context_rows.py::test_a_row_is_read_back_from_its_text",
        "methods/stages/synthesize/test_in_context_rows.py::test_the_answer_alone_is_learned",
        "methods/stages/synthesize/test_in_context_rows.py::test_rows_of_one_table_come_before_the_question",
        "methods/evaluators/quality/test_table_auc.py::test_it_is_sklearns_by_the_likelihood_of_labels",
    ],
)
class InContextRows(Stage):
    """Prompts gain rows of the same table with the same target, never the row itself."""

    asks_model = False

    # rows that come before the question; fewer where the table is smaller
    n: Annotated[int, Field(ge=0), Range(0, 32)] = 8
    # share of the samples in which neither the table nor its columns are named
    anonymous: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __call__(self, rows, roles):
        every, rows = rows, [row for row in rows if "features" in row and "target" in row]
        self.left(roles, len(every) - len(rows), len(every), "they are no rows of tables")
        out = [{k: v for k, v in row.items() if k not in ("features", "target")} for row in rows]
        for places in same_question(rows):
            for place in places:
                row, name = rows[place], str(rows[place]["id"])
                before = [rows[k] for k in draw(places, place, self.n, roles.clock, self.name, name)]
                rng = roles.clock.rng(self.name, "anonymous", name)
                anonymous = float(torch.rand((), generator=rng)) < self.anonymous
                text = question(row, before, anonymous)
                if isinstance(row["prompt"], str):
                    out[place]["prompt"] = text
                else:  # a chat's last turn asks
                    out[place]["prompt"] = [*row["prompt"][:-1], {"role": "user", "content": text}]
        return out
