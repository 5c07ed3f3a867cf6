"""ReMax: REINFORCE, where a completion's baseline is the reward of the greedy answer to the same prompt; no
critic, no group, no clipping.

The stage `greedy_baseline` writes and scores that answer. The KL to the reference is part of the reward of
each token, and a token answers for what comes after it. One step on each draw: with `num_iterations` above
1 use an objective that clips.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import (
    KLWeight,
    PolicyGradient,
    sampled_logprobs,
)
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import SAMPLES
from luthier.methods.stages.rollout.greedy_baseline import BASELINE
from luthier.registry import objective


@objective(
    paper="arXiv:2310.10505",
    row="remax",
    requires=[SAMPLES, SCORES, BASELINE, REFERENCE, LOGPROBS],
    use_when="one completion of each prompt is all you can afford, or rewards are all positive and plain"
    " REINFORCE is too noisy; it needs no critic.",
    costs="a forward and backward pass over every sampled completion, and a greedy answer to each prompt.",
    rate_factor=0.05,
    covers="the greedy baseline, the KL by token in the reward, one step without clipping.",
    omits="memory and time against PPO at the paper's scale.",
    tests=[
        "methods/objectives/policy_gradient/test_exact.py::test_remax_is_unbiased_and_its_baseline_lowers_the_variance",
        "methods/objectives/policy_gradient/test_exact.py::test_remax_learns_nothing_from_a_constant_or_greedy",
        "methods/objectives/policy_gradient/test_exact.py::test_remax_reaches_the_best_arm",
    ],
)
class ReMax(PolicyGradient):
    """Sum over a completion's tokens of -A * log p."""

    unit = "sequence"

    beta: KLWeight = 0.05  # weight of the KL to the reference in the reward; at 0 no reference is needed

    def advantages(self, roles, batch):
        scores = batch.column("scores")
        baseline = torch.tensor([float(row["baseline"]) for row in batch.rows], device=scores.device)
        advantage = (scores - baseline[batch.group])[batch.owner]
        if not self.beta:
            return advantage
        gap = sampled_logprobs(batch, roles.policy.logprobs(batch)).detach() - roles.reference.logprobs(batch)
        batch.note(kl=gap)
        return advantage - self.beta * batch.suffix(gap)

    def surrogate(self, batch, logp, ratio, advantage):
        return -advantage * logp

    def loss(self, roles, batch):
        return batch.sums(self.tokens(roles, batch))
