"""Knowledge distillation: the teacher's whole distribution in place of one token. `sft + 0.5*distill` is
Hinton's mix.

Forward KL: the policy must cover whatever the teacher finds likely. On the rows as they are (off-policy), or
on the policy's own samples where a rollout writes them. TRL has no temperature^2; it is the paper's.
"""

from luthier.methods.objectives.distillation._distill import Distill, divergence
from luthier.registry import objective


@objective(paper="arXiv:1503.02531", requires="completions teacher logprobs top")
class ForwardKL(Distill):
    """KL(teacher || policy) of each token."""

    def apart(self, teacher, policy):
        return divergence(teacher, policy)
