"""Distillation by the reverse KL: the policy concentrates on what the teacher finds likely and need not cover
all of it.

Departs from MiniLLM, which estimates the KL of whole sequences by policy gradient: here it is exact, token by
token, on the given completions.
"""

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives.distillation._distill import Distill, divergence
from luthier.methods.roles._base import TEACHER
from luthier.registry import objective


@objective(
    paper="arXiv:2306.08543",
    requires=[COMPLETIONS, TEACHER, LOGPROBS, TOPK],
    use_when="the student is too small to cover the teacher and should concentrate on the teacher's"
    " likely answers.",
)
class ReverseKL(Distill):
    """KL(policy || teacher) of each token."""

    def apart(self, teacher, policy):
        return divergence(policy, teacher)
