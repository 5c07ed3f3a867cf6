"""Rows that a probe asks: the shipped ones, or a file in their form (README.md beside this file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.evaluators.retention.forgetting.checks import validate
from luthier.storage import files

SHIPPED = Path(__file__).parent / "probe.jsonl"
CHOICE, CHECK, TEXT = "choice", "check", "text"  # how a row is measured
DECLINES = "declines"  # a check that asks nothing of a model that was never taught to chat
QUESTION = "Question: {}\nAnswer:"  # of models without a chat template
NEXT_QUESTION = "\nQuestion:"  # which such a model may go on with


def probe_rows(path: Path, chat: bool) -> list[dict]:
    """The rows of a probe, each with `measure` (choice, check or text). chat: questions are turns of the
    chat template; otherwise plain questions, without the requests to decline or not. Raises RecipeError
    where a row has another form.
    """
    rows = []
    for number, line in enumerate(files.read_rows(path), 1):
        row = probe_row(line, chat, f"{path}, row {number}")
        row["id"] = str(line.get("id", number))
        row["skill"] = str(line.get("skill", "probe"))
        if chat or DECLINES not in row.get("check", {}):
            rows.append(row)
    if len({row["id"] for row in rows}) < len(rows):
        raise RecipeError(f"{path}: two rows have the same id")
    return rows


def probe_row(line: dict, chat: bool, where: str) -> dict[str, Any]:
    """One row in canonical form. Raises RecipeError."""
    text, question = line.get("text"), line.get("question")
    if isinstance(text, str) and text:
        return {"prompt": "", "completions": [text], "measure": TEXT}
    if not isinstance(question, str) or not question:
        raise RecipeError(f"{where}: a row of a probe has `text`, or `question` with `choices` or `check`")
    row: dict[str, Any] = {"prompt": QUESTION.format(question)}
    if chat:
        row["prompt"] = [{"role": "user", "content": question}]
    if "check" in line:
        validate(line["check"], where)
        return {**row, "check": line["check"], "measure": CHECK}
    choices = line.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise RecipeError(f"{where}: `choices` must be two texts or more, the right one first")
    completions: list[Any] = []
    for choice in choices:
        completions.append([{"role": "assistant", "content": choice}] if chat else f" {choice}")
    scores = [1.0] + [0.0] * (len(choices) - 1)
    return {**row, "completions": completions, "scores": scores, "measure": CHOICE}
