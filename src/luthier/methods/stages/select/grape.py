"""GRAPE: of several answers to a prompt, keeps the one that the model to be tuned finds likeliest per token.

Supervised fine-tuning then moves the model less (Zhang et al., 2025). `reverse` keeps the unlikeliest, the
control of the paper.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, completion_logprobs, pick
from luthier.registry import stage


@stage(
    paper="arXiv:2502.04194",
    row="grape",
    requires=[COMPLETIONS, LOGPROBS],
    removes=[PAIRS, SCORES],
    use_when="prompts have answers of several models, and one of each is to be learned from.",
    costs="one forward pass over all answers.",
    covers="the likeliest answer per token, and the reverse.",
    tests=[
        "methods/stages/select/test_choice.py::test_grape_takes_the_likeliest_answer",
        "methods/stages/select/test_choice.py::test_one_answer_stays",
    ],
)
class Grape(Stage):
    """One completion of each row: that with the highest mean log-probability."""

    reverse: bool = False  # keep the unlikeliest in its place
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        out = []
        for row, answers in zip(
            rows, completion_logprobs(roles.policy, roles, rows, self.batch_size), strict=True
        ):
            means = [sum(logprobs) / max(1, len(logprobs)) for logprobs in answers]
            best = min(means) if self.reverse else max(means)
            chosen = pick(row, [means.index(best)])
            chosen.pop("scores", None)
            out.append(chosen)
        return out
