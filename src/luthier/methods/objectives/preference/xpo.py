"""XPO: online DPO with optimism, which explores where the reference never goes.

The pair is a sample of the policy and one of the reference (stages `rollout`, `opponent`, `score`,
`pairs`); beside DPO's loss the reference's samples become less likely, a little.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.preference.dpo import DPO
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import SAMPLES
from luthier.methods.stages.rollout.opponent import OPPONENT
from luthier.registry import objective


@objective(
    paper="arXiv:2405.21046",
    requires=[SAMPLES, PAIRS, OPPONENT, REFERENCE, LOGPROBS],
    use_when="pairs are sampled and judged online and the policy stays too close to what the reference says.",
    rate_factor=0.05,
)
class XPO(DPO):
    """DPO's loss plus alpha times the log-likelihood of the reference's sample."""

    alpha: NotNegative = 1e-5  # weight of the optimism

    def loss(self, roles, batch):
        likely = batch.sums(roles.policy.logprobs(batch)) * batch.column("opponent")
        by_row = likely.new_zeros(len(batch.rows)).index_add(0, batch.group, likely)
        return super().loss(roles, batch) + self.alpha * by_row
