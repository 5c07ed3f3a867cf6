"""ORPO: likelihood of the chosen completion, plus a penalty on the odds ratio to the rejected one. No
reference.

Two terms: `chosen_sft` and beta (the paper's lambda) times the odds ratio. As in the paper, the likelihood
covers the completion only; TRL and the authors' code include the prompt's tokens.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, log1mexp, logistic
from luthier.methods.objectives.preference.chosen_sft import ChosenSFT
from luthier.registry import objective


@objective(
    paper="arXiv:2403.07691",
    requires=[PAIRS, LOGPROBS],
    use_when="you have pairs and want fine-tuning and preference tuning in one stage without a"
    " reference, from a base model on.",
    starting_rate="that of `dpo`; TRL's default is 1e-6.",
    rate_factor=0.05,
)
class ORPO(Pairs):
    """-log p of each token of the best + beta * -log sigmoid(log odds of the best - log odds of the
    worst).
    """

    def terms(self):
        return [(1.0, ChosenSFT()), (1.0, self)]

    def values(self, roles, batch):
        """[N] log odds of a completion, by the mean log-probability of its tokens."""
        mean = batch.means(roles.policy.logprobs(batch))
        return mean - log1mexp(mean)

    def cost(self, margin):
        return self.beta * logistic(margin)
