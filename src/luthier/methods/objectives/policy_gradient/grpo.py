"""Group relative policy optimization: advantages are relative to the other completions of the same prompt,
without a critic.

As in the paper, tokens are averaged within a completion first, so all completions have the same weight
whatever their length (TRL's loss_type `grpo`; TRL's default is `dapo`, with beta 0). Departs from the paper
in the gradient of the KL, as TRL does: see use_bias_correction_kl.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import GroupClipped, KLWeight
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import SAMPLES
from luthier.registry import objective


@objective(
    paper="arXiv:2402.03300",
    requires=[SAMPLES, SCORES, REFERENCE, LOGPROBS],
    use_when="answers can be scored by a rule or a model and you want reinforcement learning without a"
    " critic.",
    starting_rate="1e-6 for full fine-tuning (TRL's default); with LoRA about ten times as much.",
    rate_factor=0.05,
)
class GRPO(GroupClipped):
    """Mean over a completion's tokens of the clipped surrogate and beta times the KL."""

    unit = "sequence"

    beta: KLWeight = 0.04  # weight of the KL to the reference; at 0 no reference is needed

    def loss(self, roles, batch):
        return batch.means(self.tokens(roles, batch))
