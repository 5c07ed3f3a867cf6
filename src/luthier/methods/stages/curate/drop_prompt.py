"""Empties the prompts: the model learns from the answers alone."""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    former="response_only",
    paper="arXiv:2409.14254",
    row="implicit-instruction-tuning",
    requires=[COMPLETIONS],
    use_when="you test or want response tuning: the model learns the form of answers alone, without"
    " instructions.",
    costs="nothing; rows become shorter.",
    covers="response-only tuning: batches hold no token of an instruction. Single-task tuning is `sft` on"
    " rows of one task.",
    omits="the paper's single-task data sets (poetry, recipes, chess) are not shipped.",
    tests=[
        "methods/stages/curate/test_drop_prompt.py::test_response_only_shows_no_question",
        "methods/stages/curate/test_drop_prompt.py::test_responses_alone_teach_the_form_of_answers",
    ],
)
class DropPrompt(Stage):
    """User and system turns become empty; the chat template stays. A prompt of plain text becomes an empty
    user turn.
    """

    asks_model = False

    def __call__(self, rows, roles):
        for row in rows:
            if isinstance(row["prompt"], list):
                yield {
                    **row,
                    "prompt": [
                        t if t["role"] == "assistant" else {**t, "content": ""} for t in row["prompt"]
                    ],
                }
            else:
                turns = [
                    [{"role": "assistant", "content": c}] if isinstance(c, str) else c
                    for c in row["completions"]
                ]
                yield {**row, "prompt": [{"role": "user", "content": ""}], "completions": turns}
