"""SELF-GUIDE: from one task's instruction and a few examples a model writes its own rows for the task.

The rows are the examples. Inputs are written first: for classification each for a drawn label, as many for
every label; else with earlier inputs as further examples. Copies and inputs whose length lies outside of
mean +- 2 standard deviations of the examples leave. Then each input is answered in context, greedily, and
answers that are no label, or are too long or short, leave (Zhao et al., 2024). Departs: a label's input is
written up to `attempts` times, so that classes stay balanced after the filters.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import text_of
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis
from luthier.registry import stage

SHOTS = 3  # earlier inputs beside the examples


@stage(
    example={"n": 2, "max_new_tokens": 4, "deviations": 100.0},
    paper="arXiv:2407.12874",
    row="self-guide",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a task has an instruction and a handful of examples, and no other model may help.",
    costs="two replies for each new row, and more where filters reject.",
    covers="inputs by label or with earlier inputs in context, filters of length, copies and labels, answers"
    " in context.",
    omits="the search for temperatures and the number of rows: `luthier search`; that a model gains by its"
    " own rows is not tested.",
    contract={"gives": "a tiny model writes the same input again, or none"},
    tests=[
        "methods/stages/synthesize/test_self_guide.py::test_filters_leave_exactly_what_is_valid",
        "methods/stages/synthesize/test_self_guide.py::test_labels_are_balanced",
    ],
)
class SelfGuide(Synthesis):
    """`n` new rows; column `provenance`."""

    instruction: str = ""  # of the task
    labels: list[str] = field(default_factory=list)  # of a classification task; empty: any output
    n: Annotated[int, Field(ge=1)] = 400  # new rows
    attempts: Annotated[int, Field(ge=1)] = 4  # at an input, where filters reject it
    deviations: Annotated[float, Field(gt=0)] = 2.0  # of length, from the mean of the examples

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        if not rows:
            return []
        author = self.author(roles)
        examples = []
        for row in rows:
            examples.append((question(row), text_of(roles, row["completions"][0]).strip()))
        inputs = self.inputs(author, examples)
        replies = author.ask([self.answer_prompt(examples, text) for text in inputs], inputs, 0.0)
        bounds = self.bounds([answer for _, answer in examples])
        out = []
        for number, (text, reply) in enumerate(zip(inputs, replies, strict=True)):
            answer = reply.strip().split("\n\n")[0].removeprefix("Output:").strip()
            why = self.bad_answer(answer, bounds)
            if why:
                author.reject("", answer, why)
                continue
            prompt = f"{self.instruction}\n\n{text}" if self.instruction else text
            row = author.row(rows[0], number, prompt, answer)
            row["provenance"]["sources"] = [str(each["id"]) for each in rows]
            out.append(row)
        return author.finish(rows, out, "it was an example")

    def inputs(self, author: Author, examples: list[tuple[str, str]]) -> list[str]:
        """New inputs, as many for each label."""
        bounds = self.bounds([text for text, _ in examples])
        earlier = {text for text, _ in examples}
        written: list[str] = []
        slots = [self.labels[k % len(self.labels)] if self.labels else "" for k in range(self.n)]
        for attempt in range(self.attempts):
            left = []
            for number, label in enumerate(slots):
                prompt = self.input_prompt(author, examples, label, written, number)
                (reply,) = author.ask([prompt], [f"input {attempt} {number} {label}"])
                text = reply.strip().split("\n\n")[0].removeprefix("Input:").strip()
                if not text or text in earlier:
                    why = "is empty or a copy"
                elif not bounds[0] <= len(text) <= bounds[1]:
                    why = "is too long or short"
                else:
                    earlier.add(text)
                    written.append(text)
                    continue
                author.reject("", text, why)
                left.append(label)
            slots = left
        return written

    def input_prompt(
        self, author: Author, examples: Sequence[tuple[str, str]], label: str, written: list[str], number: int
    ) -> str:
        """Examples, some inputs written before, and the label where there is one."""
        lines = [f"Task: {self.instruction}" if self.instruction else "Examples of a task."]
        if label:
            lines += [f"Output: {answer}\nInput: {text}" for text, answer in examples]
            return "\n\n".join([*lines, f"Output: {label}\nInput:"])
        lines += [f"Input: {text}" for text, _ in examples]
        rng = author.roles.clock.rng(self.name, "shots", number, at=0)
        for place in torch.randperm(len(written), generator=rng)[:SHOTS].tolist():
            lines.append(f"Input: {written[place]}")
        return "\n\n".join([*lines, "Input:"])

    def answer_prompt(self, examples: Sequence[tuple[str, str]], text: str) -> str:
        lines = [f"Task: {self.instruction}" if self.instruction else "Examples of a task."]
        lines += [f"Input: {one}\nOutput: {answer}" for one, answer in examples]
        return "\n\n".join([*lines, f"Input: {text}\nOutput:"])

    def bounds(self, texts: list[str]) -> tuple[float, float]:
        """Shortest and longest that stay, in characters."""
        lengths = [len(text) for text in texts]
        mean, spread = statistics.fmean(lengths), statistics.pstdev(lengths)
        return mean - self.deviations * spread, mean + self.deviations * spread

    def bad_answer(self, answer: str, bounds: tuple[float, float]) -> str:
        """Why an answer leaves; '' where it stays."""
        if self.labels:
            return "" if answer in self.labels else "is no label"
        if not answer:
            return "is empty or a copy"
        return "" if bounds[0] <= len(answer) <= bounds[1] else "is too long or short"
