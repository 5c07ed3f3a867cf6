"""Softmax cross-entropy over a list: fits the policy's distribution over a row's completions to that of their
scores.

The paper uses the scores as labels directly; with a temperature, the labels are softmax(score / temperature),
which allows scores of any scale. Towards temperature 0 the best completion has all the weight.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives.listwise._lists import Lists, by_row
from luthier.methods.objectives.preference._pairs import Positive
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2402.01878",
    row="lipo-lambda",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    use_when="a row has several completions with scores and the policy should follow their whole"
    " distribution, not only the order.",
    rate_factor=0.05,
)
class LiPOSoftmax(Lists):
    """-sum over a row of softmax(score / temperature) * log softmax(s)."""

    temperature: Positive = 1.0  # temperature of the softmax over scores

    def cost(self, values, batch):
        def log_shares(x):
            top = batch.over_group(x.detach(), "amax")
            return x - top - batch.over_group((x - top).exp(), "sum").log()

        target = log_shares(batch.column("scores") / self.temperature).exp()
        return by_row(batch, torch.arange(len(values), device=values.device), -target * log_shares(values))
