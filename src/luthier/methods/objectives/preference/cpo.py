"""Contrastive preference optimization: DPO without a reference, plus the likelihood of the chosen completion.

The reference is assumed to be uniform, so no second model is needed. Two terms: this one, and cpo_alpha times
`chosen_sft`.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.preference._pairs import Pairs, Probability, logistic
from luthier.methods.objectives.preference.chosen_sft import ChosenSFT
from luthier.registry import objective


@objective(
    paper="arXiv:2401.08417",
    requires=[PAIRS, LOGPROBS],
    use_when="you have pairs, no memory for a reference, and completions such as translations whose"
    " likelihood should rise as well.",
    rate_factor=0.05,
)
class CPO(Pairs):
    """-log sigmoid(beta * (log p of the best - log p of the worst)) + cpo_alpha * (-log p of each token of
    the best).
    """

    label_smoothing: Probability = 0.0  # share of pairs that may be labelled the wrong way round
    cpo_alpha: NotNegative = 1.0  # weight of the likelihood of the chosen completion

    def terms(self):
        return [(1.0, self), *([(self.cpo_alpha, ChosenSFT())] if self.cpo_alpha else [])]

    def values(self, roles, batch):
        return batch.sums(roles.policy.logprobs(batch))

    def cost(self, margin):
        return logistic(self.beta * margin, self.label_smoothing)
