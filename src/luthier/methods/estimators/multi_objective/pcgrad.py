"""PCGrad: where the gradients of two terms conflict, removes from each the component along the other.

Every term's gradient is projected onto the normal plane of each conflicting term, in random order, and the
results are added. Since everything stays in the span of the terms' gradients, it is computed from their inner
products.
"""

import torch

from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators._terms import Terms
from luthier.registry import estimator


@estimator(
    paper="arXiv:2001.06782",
    provides=[GRADIENT],
    use_when="terms or sources have conflicting gradients and each should not undo the others.",
    costs="one backward pass and one stored gradient for each term.",
    starting_rate="that of the tuner.",
)
class PCGrad(Terms):
    """Gradient surgery."""

    def combine(self, every, losses, rng):
        n, total = len(every), torch.zeros(len(every), dtype=every.dtype)
        for i in range(n):
            mine = torch.zeros_like(total)  # this term's gradient as a mix of all
            mine[i] = 1
            for j in torch.randperm(n, generator=rng).tolist():
                along = float(mine @ every[:, j])
                if j != i and along < 0 and every[j, j] > 0:
                    mine[j] -= along / every[j, j]
            total += mine
        return total
