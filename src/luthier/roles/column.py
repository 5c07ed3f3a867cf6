"""A role whose answers are a column of the rows, written by a stage: its model has left the machine."""
from __future__ import annotations

from types import SimpleNamespace

from luthier.method import role
from luthier.roles._role import Role


@role()
class Column(Role):
    """Per-token log-probabilities from a column (the stage `remember` writes one)."""

    column: str = "remembered"  # rows[column]: one list of numbers per completion

    @property
    def needs(self):
        return {self.column}

    def play(self, name, policy):
        def outputs(batch):
            return SimpleNamespace(logprobs=batch.per_token(self.column))

        return SimpleNamespace(outputs=outputs, logprobs=lambda batch: outputs(batch).logprobs)
