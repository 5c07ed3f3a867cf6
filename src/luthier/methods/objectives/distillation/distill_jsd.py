"""Distillation by the generalised Jensen-Shannon divergence (GKD): bounded, and between the forward and the
reverse KL.

beta is the teacher's share of the mixture, as in TRL. Towards 0 and 1 the divergence vanishes in proportion
to the forward and the reverse KL; use `distill` and `distill_reverse` for those. For GKD's on-policy samples
add a rollout.
"""

import math
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives.distillation._distill import Distill, divergence
from luthier.methods.roles._base import TEACHER
from luthier.registry import objective


@objective(
    paper="arXiv:2306.13649",
    requires=[COMPLETIONS, TEACHER, LOGPROBS, TOPK],
    use_when="you distil on the student's own samples (GKD), or want a bounded divergence between"
    " forward and reverse KL.",
)
class JSD(Distill):
    """beta KL(teacher || m) + (1 - beta) KL(policy || m), m = beta teacher + (1 - beta) policy."""

    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # the teacher's share of the mixture

    def apart(self, teacher, policy):
        mixture = torch.logaddexp(teacher + math.log(self.beta), policy + math.log(1 - self.beta))
        return self.beta * divergence(teacher, mixture) + (1 - self.beta) * divergence(policy, mixture)
