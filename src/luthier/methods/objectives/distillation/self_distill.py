"""Self-distillation in further pretraining: keeps the hidden states near those of a teacher that read the
same text.

A regulariser beside the masked (or the next-token) loss: `sft + self_distill`, the teacher being the same
network after a first round on the same texts, the policy begun again from where that round began. Departs
from the paper: states are compared where a token is asked, and the square is averaged over the width, so that
lambda means the same at every size.
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
)
class SelfDistill(Objective):
    """|hidden of the policy - hidden of the teacher|^2 / width, both reading the unmasked text."""

    def loss(self, roles, batch):
        whole = batch.view(ids=batch.labels)
        gap = roles.policy.outputs(whole).hidden.float() - roles.teacher.outputs(whole).hidden.float()
        return gap.square().mean(-1)
