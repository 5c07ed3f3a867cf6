"""RLOO: REINFORCE, where a completion's baseline is the mean reward of the row's other completions.

A completion is one action: its ratio is that of the whole, and the KL to the reference is part of its reward,
estimated by its log-ratio (k1). As in TRL; the paper itself makes one step on each draw, without clipping,
which this is on fresh samples.
"""

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import Clipped, KLWeight, sampled_logprobs
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import SAMPLES
from luthier.registry import objective


@objective(
    paper="arXiv:2402.14740",
    requires=[SAMPLES, SCORES, REFERENCE, LOGPROBS],
    use_when="you want the plain, unbiased policy gradient from several completions of a prompt, without a"
    " critic and without scaling by the spread of rewards.",
    rate_factor=0.05,
)
class RLOO(Clipped):
    """-min(ratio * A, clipped ratio * A) of each completion, A its reward less the mean of the others'."""

    unit = "sequence"

    beta: KLWeight = 0.05  # weight of the KL to the reference in the reward; at 0 no reference is needed

    def advantages(self, roles, batch):
        rewards, logp = batch.column("scores"), roles.policy.logprobs(batch).detach()
        others = batch.over_group(rewards.new_ones(len(rewards)), "sum") - 1
        if others.min() < 1:
            raise RecipeError("objective 'rloo' compares the completions of a prompt: set `n: 2` or more")
        if self.beta:
            gap = sampled_logprobs(batch, logp) - roles.reference.logprobs(batch)
            batch.note(kl=gap)
            rewards = rewards - self.beta * batch.sums(gap)
        baseline = (batch.over_group(rewards, "sum") - rewards) / others
        return (rewards - baseline)[batch.owner]

    def log_ratio(self, batch, change):
        return batch.sums(change)[batch.owner]

    def loss(self, roles, batch):
        # every token has its completion's number, so the mean is that number
        return batch.means(self.tokens(roles, batch))
