"""Marks in tokens where the steps of a solution end, for objective `process_reward`."""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.formats.labelled.stepwise import STEPS
from luthier.methods.stages._base import Stage
from luthier.registry import Column, stage
from luthier.text.tokens import tokenize

STEP_TARGETS = Column(
    "step_targets",
    says="marks of the tokens at which a step ends, and whether it was right (column `step_targets`)",
)


@stage(
    paper="arXiv:2305.20050",
    requires=[STEPS],
    provides=[COMPLETIONS, STEP_TARGETS],
    removes=[SCORES, PAIRS],
    use_when="rows hold solutions in steps with marks, for objective `process_reward`.",
    costs="tokenization alone.",
)
class MarkSteps(Stage):
    """The completion as token ids, step by step with a line break after each, and `step_targets`: at the last
    token of a step 1.0 if it is right and 0.0 if not, -1.0 elsewhere. Rows are those of the format
    `stepwise`; too long ones are dropped.
    """

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        most = roles.renderer.max_length or 10**9
        for row in rows:
            ids, targets = [], []
            for step, right in zip(row["steps"], row["step_labels"], strict=True):
                tokens = tokenize(roles.renderer.tokenizer, step + "\n")
                ids += tokens
                targets += [-1.0] * (len(tokens) - 1) + [float(right)]
            if len(roles.renderer.prompt(row)) + len(ids) <= most:
                out.append({**row, "completions": [ids], "step_targets": [targets]})
        self.left(roles, len(rows) - len(out), len(rows), f"they are longer than {most} tokens")
        return out
