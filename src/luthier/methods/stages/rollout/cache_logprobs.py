"""Stores the untuned policy's log-probabilities with the rows: a reference that takes no memory and no time
during training.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import CACHED_LOGPROBS, Stage, completion_logprobs
from luthier.registry import stage


@stage(
    former="remember",
    requires=[COMPLETIONS, LOGPROBS],
    provides=[CACHED_LOGPROBS],
    use_when="a reference is needed and would take memory or time at every step: its log-probabilities"
    " are computed once.",
    costs="one forward pass over all rows before training, and a number for each supervised token.",
)
class CacheLogprobs(Stage):
    """Per-token log-probabilities of every completion; use them with `roles: {reference: column}`."""

    column: str = "cached_logprobs"  # name of the column to write
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @property
    def active_provides(self):
        return frozenset({self.column})

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)  # pieces of long texts must be the rows that training reads
        for row, values in zip(
            rows, completion_logprobs(roles.policy, roles, rows, self.batch_size), strict=True
        ):
            yield {**row, self.column: values}
