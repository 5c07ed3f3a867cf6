"""Fault-aware fine-tuning: SFT on correct programs, with more weight where a faulty variant differs.

The stage `diff_masks` marks these places in lines and tokens. Token weights are larger the less the model
distinguishes the correct variant from the faulty one there. The paper's own weighting could not be verified
in full: w = 1 + a * line + b * token * s(-gap / tau).
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.preference._pairs import Positive, best_and_worst
from luthier.methods.objectives.preference.chosen_sft import ChosenSFT
from luthier.methods.stages.curate.diff_masks import LINE_MASK, TOKEN_MASK
from luthier.registry import objective


@objective(
    paper="arXiv:2503.16913",
    row="fait",
    requires=[PAIRS, LINE_MASK, TOKEN_MASK, LOGPROBS],
    use_when="you have right programs with near-miss wrong ones, and the lines and tokens in which"
    " they differ deserve more weight. Mark them by stage `diff_masks` first.",
    costs="as `sft`, with the wrong program read as well.",
    starting_rate="that of `sft`.",
    covers="weights on the lines and tokens in which right and wrong programs differ.",
    omits="the authors' exact weighting could not be verified.",
    tests=[
        "methods/objectives/supervised/test_fait.py"
        "::test_faits_weights_are_constants_and_grow_with_confusion",
        "methods/objectives/supervised/test_fait.py::test_fait_learns_where_programs_differ",
    ],
)
class FAIT(ChosenSFT):
    """w * -log p of each token of a row's best completion; gap: mean log p where it differs, best minus
    worst.
    """

    a: NotNegative = 0.5  # weight of a line that differs
    # weight of a token that differs, while the model gives both variants similar probability
    b: NotNegative = 1.0
    tau: Positive = 1.0  # gap in nats over which that weight fades

    def weights(self, roles, batch):
        """[T] not differentiated."""
        logp = roles.policy.logprobs(batch).detach()
        line, token = batch.per_token("line_mask"), batch.per_token("token_mask")
        mean = batch.sums(token * logp) / batch.sums(token).clamp(min=1)
        best, worst = best_and_worst(batch)
        gap = (mean[best] - mean[worst])[batch.group[batch.owner]]
        batch.note(gap=mean[best] - mean[worst])
        return 1 + self.a * line + self.b * token * torch.sigmoid(-gap / self.tau)

    def loss(self, roles, batch):
        chosen = self.chosen(batch)
        return self.weights(roles, batch)[chosen] * -roles.policy.logprobs(batch)[chosen]
