"""What stages share that write inputs like a few seeds, and ask of which data set an input is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.methods.stages.select._embedding import question

YES, NO = " yes", " no"


def input_prompt(seeds: Sequence[dict]) -> str:
    """Asks for one more input of the seeds' kind."""
    inputs = [f"Input: {question(row)}" for row in seeds]
    return "\n\n".join(["Inputs of one task.", *inputs, "Input:"])


def first_input(reply: str) -> str:
    """The input that a reply begins with; '' where there is none."""
    return reply.partition("Input:")[0].strip()


def origin_question(text: str, dataset: str) -> str:
    """Asks whether an input is from a data set."""
    return f"{text}\nIs the above question from {dataset}?"


def in_form(row: dict, prompt: str, answer: str) -> dict[str, Any]:
    """Prompt and completions in the form of another row: texts, or turns of a conversation."""
    if isinstance(row["prompt"], str):
        return {"prompt": prompt, "completions": [answer]}
    turns = [{"role": "user", "content": prompt}]
    return {"prompt": turns, "completions": [[{"role": "assistant", "content": answer.strip()}]]}
