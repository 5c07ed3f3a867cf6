"""Distillation by the reverse KL: the policy keeps to what the teacher finds likely, and need not cover all
of it.

Departs from MiniLLM, which gets this KL of whole sequences by policy gradient: here it is exact, token by
token, on the completions at hand.
"""

from luthier.methods.objectives.distillation._distill import Distill, divergence
from luthier.registry import objective


@objective(paper="arXiv:2306.08543", requires="completions teacher logprobs top")
class ReverseKL(Distill):
    """KL(policy || teacher) of each token."""

    def apart(self, teacher, policy):
        return divergence(policy, teacher)
