"""Knowledge distillation: trains on the teacher's full next-token distribution instead of a single label.
`sft + 0.5*distill` is Hinton's mixture.

Forward KL: the policy must cover everything that the teacher finds likely. It uses the given completions
(off-policy), or the policy's own samples if a rollout generates them. The factor temperature^2 is the
paper's; TRL leaves it out.
"""

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives.distillation._distill import Distill, divergence
from luthier.methods.roles._base import TEACHER
from luthier.registry import objective


@objective(
    paper="arXiv:1503.02531",
    requires=[COMPLETIONS, TEACHER, LOGPROBS, TOPK],
    use_when="a larger model with the same tokenizer is to teach a smaller one its whole distribution."
    " `sft + 0.5*distill` keeps the labels in.",
)
class ForwardKL(Distill):
    """KL(teacher || policy) of each token."""

    def apart(self, teacher, policy):
        return divergence(teacher, policy)
