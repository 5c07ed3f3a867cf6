"""Distilling step by step: a row with an answer and a rationale becomes two rows, one to answer and one to
explain.

Train them as two tasks, `0.5*task_sft(answer) + 0.5*task_sft(rationale)`: the answer benefits from the
rationale, which is not generated at inference. Departs from the paper: prompts for an answer have no prefix,
so that held-out rows and users need none.
"""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS, PAIRS, RATIONALE, SCORES
from luthier.methods.stages._base import Stage, without
from luthier.registry import stage


@stage(
    paper="arXiv:2305.02301",
    row="distilling-step-by-step",
    requires=[COMPLETIONS, RATIONALE],
    removes=[PAIRS, SCORES],
    use_when="rows have answers and rationales (for example from a large model) and a small model"
    " should answer better without writing rationales (distilling step by step).",
    costs="twice as many rows.",
    covers="two tasks by prefixes with a weight for each, on encoder-decoders and causal models; a rationale"
    " in front of the answer is plain `sft` on such rows.",
    omits="the gain: on the small models here rationales as a second task have not made answers five points"
    " better (claim `distilling_step_by_step`). Rationales by a large model are yours to bring.",
    tests=[
        "methods/stages/curate/test_predict_explain.py::test_step_by_step_makes_two_tasks_of_a_row",
        "methods/stages/curate/test_predict_explain.py::test_step_by_step_is_the_weighted_sum_of_two_losses",
        "methods/stages/curate/test_predict_explain.py::test_an_encoder_decoder_weighs_two_forward_passes",
    ],
)
class PredictExplain(Stage):
    """(prompt -> answer), task answer; (explain + prompt -> rationale), task rationale."""

    asks_model = False

    column: str = "rationale"  # name of the rationale column
    explain: str = "[rationale] "  # prefix of prompts that ask for the rationale
    predict: str = ""  # prefix of prompts that ask for the answer
    before: str = ""  # prefix of a rationale (a space if the prompt ends without one)

    @property
    def active_requires(self):
        return frozenset({"completions", self.column})

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for row in rows:
            rationale = row.get(self.column)
            if (
                isinstance(row["prompt"], str)
                and row.get("completions")
                and isinstance(rationale, str)
                and rationale.strip()
            ):
                plain, key = without(row), row["id"]
                out.append(
                    {
                        **plain,
                        "prompt": self.predict + row["prompt"],
                        "completions": row["completions"][:1],
                        "tasks": ["answer"],
                    }
                )
                explaining = {**plain, "id": f"{key}/rationale", "prompt": self.explain + row["prompt"]}
                out.append({**explaining, "completions": [self.before + rationale], "tasks": ["rationale"]})
        self.left(
            roles,
            len(rows) - len(out) // 2,
            len(rows),
            f"they have no `{self.column}`, no answer, or a prompt of several turns",
        )
        return out
