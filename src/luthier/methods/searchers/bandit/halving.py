"""Successive halving: n configurations after a fraction of their steps, the best n / eta of them further, up
to the end.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.searchers.bandit import _brackets
from luthier.methods.searchers.bandit._brackets import Brackets
from luthier.registry import searcher


@searcher(
    paper="arXiv:1502.07943",
    use_when="you want the plainest early stopping: many configurations briefly, the best ones further.",
    costs="nothing between runs; paused runs keep their checkpoints.",
)
class Halving(Brackets):
    """The same bracket, repeated."""

    n: Annotated[int, Field(ge=1)] = 9  # configurations per bracket

    def bracket(self, number):
        return _brackets.halving(self.n, self.shares[0], self.eta)
