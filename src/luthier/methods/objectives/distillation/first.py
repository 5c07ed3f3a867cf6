"""FIRST: distillation from the teacher's k most likely tokens, stored as columns of the rows and calibrated
beforehand.

The stage `teacher_top` stores the teacher's k most likely tokens at every position, with probabilities that
are calibrated by a temperature. Policy and teacher are compared on these k tokens and on one outcome for all
others (the paper's optional "other" token, here always): compared on the k tokens alone, nothing keeps the
policy from moving its probability elsewhere.
"""

import torch
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.stages.rollout.teacher_top import TEACHER_IDS, TEACHER_LOGPROBS
from luthier.registry import objective

ROUNDING = 1e-3  # log-probabilities are stored in 16 bits: a smaller rest cannot be told from none
NOTHING = -1e4  # log of no probability; finite, so that nothing times it is nothing


@objective(
    paper="arXiv:2408.12168",
    row="first-trustworthy-distillation",
    requires=[COMPLETIONS, TEACHER_IDS, TEACHER_LOGPROBS, LOGPROBS],
    use_when="the teacher is too large to stay in memory: its most likely tokens are stored once by"
    " stage `teacher_top`, calibrated.",
    costs="as `sft`; k token ids and log-probabilities for each supervised token are stored with the rows.",
    starting_rate="that of `sft`.",
    covers="the loss on the teacher's calibrated top tokens and all others as one outcome.",
    tests=[
        "methods/objectives/distillation/test_first.py::test_first_with_the_whole_vocabulary_is_the_forward_kl",
        "methods/objectives/distillation/test_first.py"
        "::test_a_policy_elsewhere_than_the_teacher_pays_and_is_drawn_back",
        "methods/objectives/distillation/test_first.py"
        "::test_a_student_of_the_calibrated_teacher_is_better_calibrated_than_sft",
    ],
)
class FIRST(Objective):
    """KL(teacher || policy) over the teacher's k most likely tokens and all others as one outcome."""

    def loss(self, roles, batch):
        ids, teacher = batch.table("teacher_ids").long(), batch.table("teacher_logprobs").float()
        policy = roles.policy.outputs(batch).apply(with_rest, ids)
        teacher = torch.cat([teacher, rest_of(teacher)], -1).log_softmax(-1)
        apart = divergence(teacher, policy)
        batch.note(divergence=apart)
        return apart


def with_rest(z: Tensor, ids: Tensor) -> Tensor:
    """Logits [C, V] and ids [C, k] -> [C, k + 1] log-probabilities of these tokens and of all others."""
    total = z.logsumexp(-1, keepdim=True)
    if ids.shape[-1] == z.shape[-1]:
        rest = z.new_full(total.shape, NOTHING)
    else:
        rest = z.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - total
    return torch.cat([z.gather(-1, ids) - total, rest], -1)


def rest_of(teacher: Tensor) -> Tensor:
    """Stored log-probabilities [T, k] -> [T, 1] that of all other tokens."""
    rest = 1 - teacher.exp().sum(-1, keepdim=True)
    return torch.where(rest > ROUNDING, rest.clamp(min=ROUNDING).log(), NOTHING)
