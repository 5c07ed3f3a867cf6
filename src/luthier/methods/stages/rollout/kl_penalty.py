"""Subtracts a KL penalty to the reference from the scores."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import Stage, completion_logprobs
from luthier.registry import stage


@stage(
    paper="arXiv:1909.08593",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    provides=[SCORES],
    removes=[PAIRS],
    use_when="you train by rewards and want the KL to the reference inside the reward, as in PPO-style"
    " training.",
)
class KLPenalty(Stage):
    """scores - kl_coef * (log p_policy - log p_reference), summed over the tokens of each completion."""

    kl_coef: Annotated[float, Field(ge=0)] = 0.05  # coefficient of the KL in nats
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        rows = list(rows)
        own, other = (
            completion_logprobs(who, roles, rows, self.batch_size) for who in (roles.policy, roles.reference)
        )
        for row, mine, theirs in zip(rows, own, other, strict=True):
            gaps = [sum(a) - sum(b) for a, b in zip(mine, theirs, strict=True)]
            yield {
                **row,
                "scores": [s - self.kl_coef * gap for s, gap in zip(row["scores"], gaps, strict=True)],
            }
