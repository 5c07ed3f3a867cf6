"""Hyperband: successive halving with many configurations after few steps, then with fewer after more, and so
on.

With `inner: random` it is the paper's; with `inner: tpe`, the default, new configurations are proposed from
the observations at the largest fraction that has enough of them, as in BOHB (arXiv:1807.01774).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from luthier.methods.searchers.bandit import _brackets
from luthier.methods.searchers.bandit._brackets import Brackets
from luthier.registry import nested, searcher


@searcher(
    paper="arXiv:1603.06560",
    use_when="you do not know how early runs can be judged: it tries several trade-offs between many"
    " short and few long runs.",
    costs="nothing between runs; paused runs keep their checkpoints.",
)
class Hyperband(Brackets):
    """Brackets s = s_max .. 0: ceil((s_max + 1) / (s + 1) * eta^s) configurations that begin at eta^-s."""

    inner: Annotated[Any, nested("searcher")] = "tpe"  # searcher that proposes new configurations

    def bracket(self, number):
        most = self.rungs
        s = most - number % (most + 1)
        return _brackets.halving(math.ceil((most + 1) / (s + 1) * self.eta**s - 1e-9), self.eta**-s, self.eta)
