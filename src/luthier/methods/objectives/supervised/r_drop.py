"""R-Drop: two passes over the same rows, each with draws of its own (dropout, the parts of tuner `mosa`), and
the distance between their predictions beside the likelihood.

-log p of each token + kl_weight * (KL(p || q) + KL(q || p)) / 2, where p and q are the predictions of the two
passes. The likelihood is the mean of both passes, as R-Drop's up to a factor of two, so its alpha is here
2 * kl_weight; `likelihood: first` counts the first pass alone, as MoSA does. Where nothing is drawn it is
`sft`.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._tokens import Tokens
from luthier.methods.objectives.distillation._distill import divergence
from luthier.registry import Range, objective


def symmetric_kl(z: Tensor, other: Tensor) -> Tensor:
    """Logits [C, V] of two passes -> [C] the mean of both directions of KL."""
    p, q = z.log_softmax(-1), other.log_softmax(-1)
    return (divergence(p, q) + divergence(q, p)) / 2


@objective(
    paper="arXiv:2106.14448",
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    use_when="rows are few and the model trains with dropout or with tuner `mosa`: what is drawn in a pass"
    " should not change its predictions.",
    costs="twice `sft`, and a comparison of whole vocabularies.",
    starting_rate="that of `sft`.",
)
class RDrop(Tokens):
    """Likelihood of the completions, and agreement of two passes that draw anew."""

    kl_weight: Annotated[float, Field(ge=0), Range(0.1, 5.0, log=True)] = 1.0  # weight of the divergence
    # passes whose likelihood counts: both, half each, or the first
    likelihood: Literal["both", "first"] = "both"

    def cost(self, roles, batch):
        first, second = roles.policy.outputs(batch), roles.policy(batch)
        apart = first.apply(symmetric_kl, beside=[second])
        batch.note(divergence=apart)
        cost = -first.logprobs
        if self.likelihood == "both":
            cost = (cost - second.logprobs) / 2
        return cost + self.kl_weight * apart
