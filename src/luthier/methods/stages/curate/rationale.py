"""A row with an answer and a rationale becomes one with two completions, distinguished by task."""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS, PAIRS, RATIONALE, SCORES
from luthier.methods.stages._base import Stage, without
from luthier.registry import Column, stage

TASKS = Column(
    "tasks",
    per="completion",
    says="completions that name their task (column `tasks`)",
    example=("answer", "rationale"),
)


@stage(
    paper="arXiv:2404.12636",
    row="morepair",
    requires=[COMPLETIONS, RATIONALE],
    provides=[TASKS],
    removes=[PAIRS, SCORES],
    use_when="rows have answers and rationales to be trained on as two tasks after one prompt, for"
    " objective `morepair`.",
    costs="a second completion for each row.",
)
class Rationale(Stage):
    """completions = [the answer, `before` and the rationale]; tasks = ["answer", "rationale"]. Rows without
    either are dropped.
    """

    asks_model = False

    column: str = "rationale"  # name of the rationale column
    before: str = ""  # prefix of a rationale, which distinguishes it from an answer

    @property
    def active_requires(self):
        return frozenset({"completions", self.column})

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for row in rows:
            rationale = row.get(self.column)
            if row.get("completions") and isinstance(rationale, str) and rationale.strip():
                text = self.before + rationale
                second = (
                    text
                    if isinstance(row["completions"][0], str)
                    else [{"role": "assistant", "content": text}]
                )
                out.append(
                    {
                        **without(row),
                        "completions": [row["completions"][0], second],
                        "tasks": ["answer", "rationale"],
                    }
                )
        self.left(
            roles, len(rows) - len(out), len(rows), f"they have no `{self.column}`, or nothing to explain"
        )
        return out
