"""Masks tool calls that failed: an assistant turn that a tool answers with an error is not trained on."""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.registry import stage

ERRORS = (
    "is not defined",
    "unexpected keyword",
    "400 client error",
    "Traceback (most recent call last)",
    "Error:",
    "missing 1 required",
)


@stage(
    paper="arXiv:2412.15495",
    row="tl-training",
    requires=[COMPLETIONS],
    use_when="conversations with tools contain calls that failed, and these should be read but not"
    " trained on.",
    costs="no model is read.",
)
class MaskFailedCalls(Stage):
    """Sets "loss": false at every assistant turn that a tool answers with one of `errors`. Rows with nothing
    left to train on are dropped.
    """

    asks_model = False

    errors: tuple[str, ...] = ERRORS  # phrases in a tool's answer that mark a failed call, in any case

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for row in rows:
            turned = [
                self.masked(c) if isinstance(c, list) and c and isinstance(c[0], dict) else c
                for c in row["completions"]
            ]
            if all(
                not isinstance(c, list) or not isinstance(c[0], dict) or any(map(learned, c)) for c in turned
            ):
                out.append({**row, "completions": turned})
        self.left(roles, len(rows) - len(out), len(rows), "every tool call in them failed")
        return out

    def masked(self, turns: list[dict]) -> list[dict]:
        """Turns, those that failed switched off."""
        out = []
        for i, turn in enumerate(turns):
            answers = []
            for later in turns[i + 1 :]:
                if later["role"] != "tool":
                    break
                answers.append(str(later.get("content", "")).lower())
            wrong = turn["role"] == "assistant" and any(e.lower() in a for e in self.errors for a in answers)
            out.append({**turn, "loss": False} if wrong else turn)
        return out


def learned(turn: dict) -> bool:
    return turn["role"] == "assistant" and turn.get("loss") is not False
