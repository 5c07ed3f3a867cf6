"""Self-questioning (SQ-LLaVA): in a share of the conversations the user's questions are learned, too.

So the model that sees an image also learns what can be asked about it. A question that is learned begins with
a mark of its own ([vusr] in the paper, a token when `add_tokens: ["[vusr]"]` is set), with which the model is
asked for questions later; the loss is on the question and on the answer. Which conversations, follows from
seed and row. Departs: what the chat template opens the user's turn with, and the mark, are learned with the
question; an image that stands before a question has no loss.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.registry import Range, stage


@stage(
    paper="arXiv:2403.11299",
    row="sq-llava",
    requires=[COMPLETIONS],
    use_when="conversations about images hold questions that say much about the image, and the model should"
    " learn from asking as well as from answering.",
    costs="no model is read; more tokens are trained on in the same rows.",
    covers="questions of a share of the conversations behind their own mark in the loss, images left out; low"
    " rank on tower, projector and language model are `parts` of architecture `vision_language`.",
    omits="prototypes in the projector, and the recipe's two stages on 558k captions and 665k conversations.",
    tests=[
        "methods/stages/augment/test_sq_llava.py::test_questions_behind_the_mark_are_learned_and_no_others",
        "methods/stages/augment/test_sq_llava.py::test_an_image_before_a_question_is_not",
    ],
)
class SQLlava(Stage):
    """Marks questions of the user as learned. Rows that are no conversations stay as they are."""

    asks_model = False
    row_by_row = True

    ratio: Annotated[float, Field(ge=0, le=1), Range(0.1, 1)] = 0.5  # share of conversations
    mark: str = "[vusr]"  # what a question that is learned begins with

    def __call__(self, rows, roles):
        out = []
        for row in rows:
            rng = roles.clock.rng(self.name, row["id"], at=0)
            chosen = float(torch.rand((), generator=rng)) < self.ratio
            out.append(self.turned(row) if is_conversation(row) and chosen else row)
        return out

    def turned(self, row: dict) -> dict:
        """A conversation in which the user's questions are learned, from the first one on."""
        turns = [*row["prompt"], *row["completions"][0]]
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(row["prompt"]))
        learned = [self.marked(turn) if turn["role"] == "user" else turn for turn in turns[first:]]
        return {**row, "prompt": turns[:first], "completions": [learned]}

    def marked(self, turn: dict) -> dict:
        """A question behind its mark, to be learned."""
        content = turn["content"]
        if isinstance(content, str):
            return {**turn, "content": f"{self.mark}{content}", "loss": True}
        parts = list(content)
        for i, part in enumerate(parts):
            if part.get("type") == "text":
                parts[i] = {**part, "text": f"{self.mark}{part['text']}"}
                return {**turn, "content": parts, "loss": True}
        return turn  # an image alone is no question


def is_conversation(row: dict) -> bool:
    """Is a row turns, with one reply that is turns?"""
    completions = row["completions"]
    if not isinstance(row["prompt"], list) or len(completions) != 1:
        return False
    reply = completions[0]
    return isinstance(reply, list) and bool(reply) and isinstance(reply[0], dict)
