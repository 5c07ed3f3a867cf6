"""Writes how surprising each row's answer is to the model: per token."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, completion_logprobs
from luthier.registry import Column, stage

PERPLEXITY = Column("perplexity", says="rows with a perplexity", example=(2.5, 4.0, 1.5))


@stage(
    requires=[COMPLETIONS, LOGPROBS],
    provides=[PERPLEXITY],
    use_when="rows are to be filtered, ordered or weighted by how surprising they are to the model.",
    costs="one forward pass over the rows.",
)
class Perplexity(Stage):
    """Column `perplexity`: exp of the mean negative log-probability of the first completion's tokens."""

    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        out = []
        for row, logprobs in zip(
            rows, completion_logprobs(roles.policy, roles, rows, self.batch_size), strict=True
        ):
            first = logprobs[0]
            out.append({**row, "perplexity": math.exp(-sum(first) / max(1, len(first)))})
        return out
