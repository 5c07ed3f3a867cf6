"""Rows without the data: inputs like a few seeds, selected by a discriminator, answered by a tuned model.

The rows are the seeds; of them only inputs are read. A model writes inputs, of which those stay that the
discriminator finds likelier to be from the data set than not (p(yes) > p(no), tuned on stage `origin_rows`),
until there are `n`. The answers are greedy ones of the model that was tuned on the data (Wang et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

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
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis
from luthier.registry import stage

BATCH = 64  # inputs that are written before the discriminator reads them


@stage(
    example={"n": 2, "max_new_tokens": 4},
    paper="arXiv:2405.17258",
    row="trans-lora",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a tuned model is there, its data is gone but for a few inputs, and another model is to learn"
    " the same.",
    costs="a written input, the discriminator's answer and the tuned model's for each new row, and more where"
    " inputs are rejected.",
    covers="inputs from seeds, the discriminator's decision, answers of the tuned model, models of any"
    " tokenizers, since only texts go from one to another.",
    omits="batches of the discriminator and of the tuned model: both read one text after the other.",
    contract={"gives": "a tiny model writes the same input again, or none"},
    tests=["methods/stages/synthesize/test_transfer_rows.py::test_rows_are_what_the_discriminator_accepts"],
)
class TransferRows(Synthesis):
    """`n` new rows; column `provenance`."""

    n: Annotated[int, Field(ge=1)] = 250  # new rows
    discriminator: Any = None  # run that was tuned on stage `origin_rows`; null: every input stays
    source: Any = None  # run whose answers are learned, as `writer` is named; null: the policy
    dataset: str = "this data set"  # its name in the discriminator's question
    attempts: Annotated[int, Field(ge=1)] = 10  # written inputs at most, for each new row
    temperature: Annotated[float, Field(ge=0)] = 1.0  # of the inputs

    def __call__(self, rows, roles):
        rows = list(rows)
        if not rows:
            return []
        author, source = self.author(roles), self.author(roles, self.source)
        inputs = self.inputs(author, rows)
        replies = source.ask([text for text, _ in inputs], inputs, 0.0)
        out = []
        for (text, number), reply in zip(inputs, replies, strict=True):
            if not reply.strip():
                author.reject("", text, "has no answer")
                continue
            row = author.row(rows[0], number, text, reply)
            row["provenance"] |= {"sources": [str(one["id"]) for one in rows], "answers": source.speaker.name}
            out.append(row)
        return author.finish(rows, out, "it was a seed")

    def inputs(self, author: Author, seeds: list[dict]) -> list[tuple[str, int]]:
        """New inputs that the discriminator accepts, each with the number of its attempt."""
        stays = self.decision(seeds[0])
        earlier = {question(row).strip() for row in seeds}
        prompt = input_prompt(seeds)
        out: list[tuple[str, int]] = []
        for first in range(0, self.attempts * self.n, BATCH):
            numbers = range(first, min(first + BATCH, self.attempts * self.n))
            for number, reply in zip(numbers, author.ask([prompt] * len(numbers), numbers), strict=True):
                text = first_input(reply)
                if not text or text in earlier:
                    author.reject("", text, "is empty or a copy")
                    continue
                earlier.add(text)
                if stays(text):
                    out.append((text, number))
                else:
                    author.reject("", text, "is not of the data set")
            if len(out) >= self.n:
                break
        return out[: self.n]

    def decision(self, seed: dict) -> Callable[[str], bool]:
        """A function: does an input stay?"""
        if self.discriminator is None:
            return lambda text: True
        from luthier.model.loaded import load

        loaded = load(str(self.discriminator))

        def stays(text: str) -> bool:
            prompt = origin_question(text, self.dataset)
            sums = []
            for answer in (YES, NO):
                row = {"id": "origin", **in_form(seed, prompt, answer)}
                sums.append(float(loaded.logprobs([row]).sum()))
            return sums[0] > sums[1]

        return stays
