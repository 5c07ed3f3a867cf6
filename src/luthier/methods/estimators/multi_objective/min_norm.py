"""MGDA: steps along the shortest convex combination of the terms' gradients, which increases no term.

The combination is found by Frank-Wolfe on the inner products of the gradients; where its norm is zero, no
direction improves every term.
"""

import torch

from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators._terms import Terms
from luthier.registry import estimator


@estimator(
    paper="arXiv:1810.04650",
    row="moo-nonsmooth-pde",
    provides=[GRADIENT],
    use_when="an objective has several terms and no step should increase any of them.",
    costs="one backward pass and one stored gradient for each term.",
    starting_rate="that of the tuner.",
    covers="the shortest vector in the hull of the goals' gradients, all that tuning shares with it.",
    omits="subgradients of non-smooth goals, differential equations and their reduced models.",
    tests="methods/estimators/multi_objective/test_min_norm.py"
    "::test_min_norm_is_the_shortest_mix_and_no_term_is_against_it",
)
class MinNorm(Terms):
    """Multiple-gradient descent."""

    iterations: int = 200  # maximum Frank-Wolfe iterations; two terms need one

    def combine(self, every, losses, rng):
        share = torch.full((len(every),), 1 / len(every), dtype=every.dtype)
        for _ in range(self.iterations):
            best = int((every @ share).argmin())
            toward = torch.zeros_like(share)
            toward[best] = 1
            way = toward - share
            length = float(way @ every @ way)
            go = min(1.0, max(0.0, -float(share @ every @ way) / length)) if length > 0 else 0.0
            if go < 1e-9:
                break
            share = share + go * way
        return share
