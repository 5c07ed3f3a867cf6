"""SASR: a step is SFT's or GRPO's, as stage `sasr` has chosen; the log says which (`supervised`) and how
likely it was.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import GroupClipped, KLWeight
from luthier.methods.roles._base import REFERENCE
from luthier.methods.roles.averages.supervised_share import SUPERVISED_SHARE
from luthier.methods.stages._base import SAMPLES
from luthier.methods.stages.rollout.sasr import DEMONSTRATION
from luthier.registry import objective


@objective(
    paper="arXiv:2505.13026",
    row="sasr",
    requires=[SAMPLES, SCORES, DEMONSTRATION, SUPERVISED_SHARE, REFERENCE, LOGPROBS],
    use_when="stage `sasr` chooses between demonstrations and samples.",
    rate_factor=0.1,
    covers="both losses, averaged by completion.",
    tests=["methods/stages/rollout/test_sasr.py::test_a_step_is_sfts_or_grpos"],
)
class SASR(GroupClipped):
    """Mean over a completion's tokens of -log p of a demonstration, of GRPO's loss of a sample."""

    unit = "sequence"

    beta: KLWeight = 0.04  # weight of the KL to the reference; at 0 no reference is needed

    def loss(self, roles, batch):
        flags = torch.tensor([bool(row["demonstration"]) for row in batch.rows], device=batch.ids.device)
        batch.note(supervised=flags.float())
        shares = [float(row["supervised_share"]) for row in batch.rows if "supervised_share" in row]
        if shares:
            batch.note(supervised_share=torch.tensor(shares))
        supervised = -batch.means(roles.policy.logprobs(batch))
        if bool(flags.all()):
            return supervised
        return torch.where(flags[batch.group], supervised, batch.means(self.tokens(roles, batch)))
