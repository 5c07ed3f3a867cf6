"""Self-distillation for continued pretraining: keeps the hidden states near those of a teacher that reads the
same text.

A regulariser beside the masked-LM or next-token loss: `sft + self_distill`. The teacher is the same network
after a first round on the same texts, and the policy starts again from where that round started. Departs from
the paper: states are compared at supervised positions, and the squared error is averaged over the width, so
that lambda means the same at every model size.
"""

from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.roles._base import TEACHER
from luthier.registry import objective


@objective(
    paper="arXiv:2210.02871",
    row="self-distill-further-pretrain",
    requires=[COMPLETIONS, TEACHER, HIDDEN],
    contract={"head": "it compares hidden states below the head; train the head with a loss beside it"},
    use_when="you pretrain further on few domain texts and want to keep hidden states near those of a"
    " first round.",
    starting_rate="that of `sft`.",
    covers="the regulariser beside a masked-LM or next-token loss, the model of a first round as teacher.",
    omits="images; several rounds are a plan `sequence` written by hand.",
    tests=[
        "methods/objectives/distillation/test_self_distill.py"
        "::test_self_distillation_is_nothing_at_the_teacher_and_keeps_the_student_near",
        "methods/objectives/distillation/test_self_distill.py"
        "::test_the_students_fine_tuning_is_no_less_accurate",
    ],
)
class SelfDistill(Objective):
    """|hidden of the policy - hidden of the teacher|^2 / width, both reading the unmasked text."""

    def loss(self, roles, batch):
        whole = batch.view(ids=batch.labels)
        gap = roles.policy.outputs(whole).hidden.float() - roles.teacher.outputs(whole).hidden.float()
        return gap.square().mean(-1)
