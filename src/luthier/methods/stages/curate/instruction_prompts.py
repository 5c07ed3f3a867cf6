"""Tx-LLM's rows: one form for classification, regression and generation, with or without examples in front.

A row becomes instructions, context, question and answer. With a column of classes of which there are two the
answer is the letter of an option, (A) or (B); numbers become bins, whole numbers from 0 to `bins` between the
least and the largest of the rows, and `decode` gives the middle of a bin back; all else is answered as it is.
Of the rows a share `few_shot` has 1 to `shots` other rows of its task as examples in front, drawn at random
(Chaves et al., 2024).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, text_of, without
from luthier.methods.stages.select._embedding import question
from luthier.registry import stage


@stage(
    paper="arXiv:2406.06316",
    row="tx-llm",
    requires=[COMPLETIONS],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="many tables (classes, numbers, texts) are to become instructions for one model.",
    costs="nothing; prompts with examples are longer.",
    covers="instructions, context and question, options for two classes, numbers as bins, the share of"
    " prompts with drawn examples; the mix by sizes is stage `capped_mixture`, the area under the curve"
    " evaluator `yes_no_auc`.",
    omits="the Therapeutics Data Commons' own sets, examples by likeness of molecules, Spearman and MAE as"
    " metrics.",
    tests=[
        "methods/stages/curate/test_instruction_prompts.py::test_bins_are_decoded_within_half_a_bin",
        "methods/stages/curate/test_instruction_prompts.py::test_the_share_of_prompts_with_examples",
        "methods/stages/curate/test_instruction_prompts.py::test_two_classes_are_options",
    ],
)
class InstructionPrompts(Stage):
    """prompt = instructions, context, examples, question; completion = option, bin or text."""

    asks_model = False

    column: str = "source"  # column that names a row's task; without it all are of one
    # what stands first; a column of that name goes before
    instructions: str = "Answer the following question."
    context: str = "context"  # column with a short background, where rows have it
    bins: Annotated[int, Field(ge=1)] = 1000  # of numbers
    few_shot: Annotated[float, Field(ge=0, le=1)] = 0.3  # share of prompts with examples
    shots: Annotated[int, Field(ge=1)] = 10  # examples at most

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        tasks: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for row in rows:
            answer = text_of(roles, row["completions"][0]).strip()
            tasks[str(row.get(self.column))].append((question(row).strip(), answer))
        coders = {}
        for name, some in tasks.items():
            coders[name] = self.coder([answer for _, answer in some])
        out, places = [], dict.fromkeys(tasks, 0)
        for row in rows:
            task = str(row.get(self.column))
            place = places[task]
            places[task] += 1
            out.append(self.written(row, tasks[task], place, coders[task], roles))
        return out

    def written(
        self, row: dict, some: list[tuple[str, str]], place: int, coder: dict[str, Any], roles: Any
    ) -> dict:
        """One row in the form."""
        rng = roles.clock.rng(self.name, row["id"], at=0)
        parts = [f"Instructions: {row.get('instructions') or self.instructions}"]
        if row.get(self.context):
            parts.append(f"Context: {row[self.context]}")
        if float(torch.rand(1, generator=rng)) < self.few_shot and len(some) > 1:
            count = 1 + int(torch.randint(self.shots, (1,), generator=rng))
            order = torch.randperm(len(some), generator=rng).tolist()
            for other in [k for k in order if k != place][:count]:
                before, reply = some[other]
                parts.append(self.question(before, reply, coder))
        ask, answer = some[place]
        parts.append(self.question(ask, "", coder))
        turns = not isinstance(row["prompt"], str)
        text, reply = "\n\n".join(parts), self.coded(answer, coder)
        prompt: Any = [{"role": "user", "content": text}] if turns else f"{text} "
        completion: Any = [{"role": "assistant", "content": reply}] if turns else reply
        new = {**without(row), "prompt": prompt, "completions": [completion]}
        if "low" in coder:
            new |= {"low": coder["low"], "high": coder["high"]}
        return new

    def question(self, ask: str, answer: str, coder: dict[str, Any]) -> str:
        """A question with its options, and its answer where there is one."""
        options = "".join(f" ({letter}) {name}" for name, letter in coder.get("options", {}).items())
        reply = f" {self.coded(answer, coder)}" if answer else ""
        return f"Question: {ask}{options}\nAnswer:{reply}"

    def coder(self, answers: list[str]) -> dict[str, Any]:
        """How answers of a task are written: options, the ends of numbers, or neither."""
        names = sorted({*answers})
        if len(names) == 2:
            return {"options": dict(zip(names, "AB", strict=True))}
        try:
            numbers = [float(answer) for answer in answers]
        except ValueError:
            return {}
        return {"low": min(numbers), "high": max(numbers)} if len(names) > 2 else {}

    def coded(self, answer: str, coder: dict[str, Any]) -> str:
        if "options" in coder:
            return f"({coder['options'][answer]})"
        if "low" in coder:
            return str(encode(float(answer), coder["low"], coder["high"], self.bins))
        return answer


def encode(value: float, low: float, high: float, bins: int) -> int:
    """The bin of a number, 0 to `bins`; what lies beyond the ends is in the last one."""
    share = (value - low) / (high - low) if high > low else 0.0
    return min(bins, max(0, round(share * bins)))


def decode(number: int, low: float, high: float, bins: int) -> float:
    """The number that a bin stands for: within half a bin of what was encoded."""
    return low + (high - low) * number / bins
