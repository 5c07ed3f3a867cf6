"""Dynamic fine-tuning: SFT with each token weighted by its probability, so that unlikely tokens cannot
dominate.

SFT's gradient is a policy gradient with reward 1 / p; the weight p makes this reward constant.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._tokens import Tokens
from luthier.registry import objective


@objective(
    paper="arXiv:2508.05629",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="SFT overfits unlikely tokens of its rows or generalises badly: tokens are weighted by"
    " their own probability.",
    costs="as `sft`.",
    starting_rate="that of `sft`.",
)
class DFT(Tokens):
    """-p log p of each supervised token, p not differentiated."""

    def cost(self, roles, batch):
        logprobs = roles.policy.logprobs(batch)
        return -logprobs.detach().exp() * logprobs
