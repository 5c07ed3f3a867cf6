"""A role whose log-probabilities are a column of the rows, written by a stage: its model need not
be loaded.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import FIXED_TARGETS
from luthier.methods.roles._base import Role
from luthier.model.batch import Batch
from luthier.registry import role


@role(
    use_when="the reference's log-probabilities were stored by stage `cache_logprobs`.",
    costs="neither memory nor a forward pass.",
)
class Column(Role):
    """Per-token log-probabilities from a column of the rows (the stage `cache_logprobs` writes one)."""

    answers: ClassVar[Literal["outputs", "logprobs", "text"]] = "logprobs"

    column: str = "cached_logprobs"  # name of the column: one list of numbers per completion

    @property
    def active_requires(self):
        return {self.column, FIXED_TARGETS}

    def play(self, name, policy):
        return ColumnModel(name, self.column)


class ColumnModel:
    """A role whose log-probabilities are a column: those of each supervised token, and nothing else."""

    def __init__(self, role: str, column: str):
        self.role, self.column = role, column

    def outputs(self, batch: Batch) -> ColumnOutputs:
        return ColumnOutputs(self, batch.per_token(self.column))

    def logprobs(self, batch: Batch) -> Tensor:
        return batch.per_token(self.column)


class ColumnOutputs:
    """The column's values for a batch."""

    def __init__(self, who: ColumnModel, logprobs: Tensor):
        self.who, self.logprobs = who, logprobs

    def __getattr__(self, name: str):
        raise RecipeError(
            f"roles.{self.who.role}: column '{self.who.column}' has only the log-probabilities"
            f" of the supervised tokens, but this recipe also needs '{name}', which only a model"
            f" gives: e.g. `roles: {{{self.who.role}: initial}}`"
        )
