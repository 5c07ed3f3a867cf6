"""FIRST: distillation from the teacher's k most likely tokens, stored as columns of the rows and calibrated
beforehand.

The stage `teacher_top` stores the teacher's k most likely tokens at every position, with probabilities that
are calibrated by a temperature. Policy and teacher are compared on these k tokens only, each renormalised
over them.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.stages.rollout.teacher_top import TEACHER_IDS, TEACHER_LOGPROBS
from luthier.registry import objective


@objective(
    paper="arXiv:2408.12168",
    row="first-trustworthy-distillation",
    requires=[COMPLETIONS, TEACHER_IDS, TEACHER_LOGPROBS, LOGPROBS],
    use_when="the teacher is too large to stay in memory: its most likely tokens are stored once by"
    " stage `teacher_top`, calibrated.",
    costs="as `sft`; k token ids and log-probabilities for each supervised token are stored with the rows.",
    starting_rate="that of `sft`.",
)
class FIRST(Objective):
    """KL(teacher || policy) over the teacher's k most likely tokens."""

    def loss(self, roles, batch):
        ids, teacher = batch.table("teacher_ids").long(), batch.table("teacher_logprobs")
        policy = roles.policy.outputs(batch).at(ids)
        apart = divergence(teacher.log_softmax(-1), policy.log_softmax(-1))
        batch.note(divergence=apart)
        return apart
