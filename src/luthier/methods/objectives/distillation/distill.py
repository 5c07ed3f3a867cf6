"""Knowledge distillation: trains on the teacher's whole distribution over the next token in place of one
label. `sft + 0.5*distill` is Hinton's mix.

Forward KL: the policy must cover whatever the teacher finds likely. On the rows as they are (off-policy), or
on the policy's own samples where a rollout writes them. TRL has no temperature^2; it is the paper's.
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
