"""Scores completions by how likely a model thinks they are: its own judgement of them, without a reward.

The self-reward of sharpening, log p(y | x) under the model before tuning (arXiv:2412.01951, section 2), as a
sum, or per token, which does not prefer short answers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import Stage, completion_logprobs
from luthier.registry import stage


@stage(
    paper="arXiv:2412.01951",
    row="sharpening",
    requires=[COMPLETIONS, LOGPROBS],
    provides=[SCORES],
    removes=[PAIRS],
    use_when="there is no reward, and the model's own likelihood tells good answers from bad ones.",
    costs="a forward pass over all completions.",
    covers="the self-reward, as a sum or per token.",
    omits="the share of the majority as the self-reward.",
    tests=["methods/plans/rounds/test_sharpening.py::test_the_best_of_many_is_the_likeliest"],
)
class Likelihood(Stage):
    """scores = log p(completion | prompt) in nats."""

    of: Literal["reference", "policy"] = "reference"  # whose likelihood
    per_token: bool = False  # divide by the number of tokens
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @property
    def active_requires(self):
        return self.requires | {REFERENCE} if self.of == "reference" else self.requires

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        for row, logprobs in zip(rows, self.logprobs(rows, roles), strict=True):
            scores = []
            for tokens in logprobs:
                scores.append(sum(tokens) / (max(1, len(tokens)) if self.per_token else 1))
            yield {**row, "scores": scores}

    def logprobs(self, rows, roles):
        return completion_logprobs(getattr(roles, self.of), roles, rows, self.batch_size)
