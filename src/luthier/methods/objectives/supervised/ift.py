"""Intuitive fine-tuning: SFT on inputs mixed with the model's own predictions, with each token weighted by
the discounted loss of what follows.

Two passes: the first predicts every supervised token; the second reads, at each position, a mixture of the
embeddings of the given and the predicted token. A token's weight is the discounted loss of all later tokens.
Departs: the average is over tokens, not first within a completion, and embeddings are those of the policy
itself (the paper uses those of a copy that follows it).
"""

import torch

from luthier.methods.architectures._base import EMBEDDINGS, LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Probability
from luthier.registry import objective


@objective(
    paper="arXiv:2405.11870",
    row="ift",
    requires=[COMPLETIONS, LOGPROBS, TOPK, EMBEDDINGS],
    use_when="you have only SFT rows and want some of what preference tuning gives: the model also"
    " learns to continue from its own predictions.",
    costs="two forward passes and one backward pass a row.",
    starting_rate="that of `sft`.",
    covers="the loss of the authors' code in two passes: shifted guess, discounted sums, gradient through"
    " the weights.",
    tests=[
        "methods/objectives/supervised/test_ift.py::test_ift_without_its_two_parts_is_sft",
        "methods/objectives/supervised/test_ift.py::test_ift_by_hand_in_two_passes",
    ],
)
class IFT(Objective):
    """w_i * -log p(token i | mixed beginning), w_i the discounted sum of the losses from i on, of mean 1 in a
    completion.
    """

    lam: Probability = 0.2  # share of the model's own prediction in the mixed input; 0: the given tokens only
    gamma: Probability = 0.95  # discount per token; 0 weights all tokens equally

    def loss(self, roles, batch):
        with torch.no_grad():
            guess = roles.policy(batch.view()).first()
        other = batch.ids.clone()
        other[batch.supervised] = guess
        cost = -roles.policy.logprobs(batch.view(mixed=(other, self.lam * batch.supervised)))
        if not self.gamma:
            return cost
        weight = batch.suffix(cost, self.gamma)
        return weight / batch.means(weight)[batch.owner] * cost
