"""SimPO: the mean log-probability of a completion is its reward, without a reference, and the margin has a
target.

TRL has it as CPO's loss_type `simpo`, with cpo_alpha 0.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.preference._pairs import Beta, Pairs, Probability, logistic
from luthier.registry import objective


@objective(
    paper="arXiv:2405.14734",
    requires=[PAIRS, LOGPROBS],
    use_when="you have pairs, no memory for a reference and answers of unlike length.",
    starting_rate="3e-7 to 1e-6 for full fine-tuning in the paper.",
    rate_factor=0.05,
)
class SimPO(Pairs):
    """-log sigmoid(beta * (mean log p of the best - mean log p of the worst) - simpo_gamma)."""

    beta: Beta = 2.0  # scale of the reward
    simpo_gamma: NotNegative = 0.5  # target margin between the chosen and the rejected completion
    label_smoothing: Probability = 0.0  # share of pairs that may be labelled the wrong way round

    def values(self, roles, batch):
        return batch.means(roles.policy.logprobs(batch))

    def cost(self, margin):
        return logistic(self.beta * margin - self.simpo_gamma, self.label_smoothing)
