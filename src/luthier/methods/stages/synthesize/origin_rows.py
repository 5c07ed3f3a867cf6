"""Rows that teach a discriminator: is an input from this data set, or did a model write it from a few seeds?

Each row becomes a question with the answer yes. As many inputs are written from `seeds` of the rows, and each
becomes one with the answer no (Wang et al., 2024). What is tuned on these rows then selects among the inputs
that another model writes (stage `transfer_rows`).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._seeds import (
    NO,
    YES,
    first_input,
    in_form,
    input_prompt,
    origin_question,
)
from luthier.methods.stages.synthesize._synthesis import Synthesis
from luthier.registry import stage


@stage(
    example={"seeds": 2, "max_new_tokens": 4},
    paper="arXiv:2405.17258",
    row="trans-lora",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a discriminator is to tell a data set's inputs from written ones, while the data is there.",
    costs="a written input for each row.",
    covers="inputs of the data set as yes, as many written from the same seeds as no.",
    omits="other negatives, such as inputs of other data sets.",
    tests=["methods/stages/synthesize/test_origin_rows.py::test_rows_are_yes_and_written_inputs_no"],
)
class OriginRows(Synthesis):
    """Two rows for each row: a question about it, and one about an input that was written."""

    dataset: str = "this data set"  # its name, in the question
    seeds: Annotated[int, Field(ge=1)] = 5  # rows from which inputs are written
    temperature: Annotated[float, Field(ge=0)] = 1.0  # of the inputs

    def __call__(self, rows, roles):
        rows = list(rows)
        if not rows:
            return []
        author = self.author(roles)
        # those that stage `random_rows` draws first
        order = torch.randperm(len(rows), generator=roles.clock.rng("random_rows", 0, at=0)).tolist()
        prompt = input_prompt([rows[place] for place in order[: self.seeds]])
        replies = author.ask([prompt] * len(rows), range(len(rows)))
        inputs = {question(row) for row in rows}
        out = []
        for row, reply in zip(rows, replies, strict=True):
            out.append({**self.about(row, question(row), YES), "id": f"{row['id']}/yes"})
            text = first_input(reply)
            if not text or text in inputs:
                author.reject(row["id"], reply, "is empty or a copy")
                continue
            out.append({**self.about(row, text, NO), "id": f"{row['id']}/no"})
        written = len(out) - len(rows)
        self.warn(roles, f"{len(rows)} inputs of {self.dataset} and {written} written ones")
        return out

    def about(self, row: dict, text: str, answer: str) -> dict:
        """A question about an input, in the row's form."""
        return in_form(row, origin_question(text, self.dataset), answer)
