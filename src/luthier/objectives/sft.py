"""Supervised fine-tuning: the likelihood of the completions."""

from luthier.method import objective
from luthier.objectives._objective import Objective


@objective(wants="completions logprobs")
class SFT(Objective):
    """-log p of each supervised token. For a classifier this is cross-entropy, for a masked LM the cloze loss."""

    def loss(self, roles, batch):
        return -roles.policy.logprobs(batch)
