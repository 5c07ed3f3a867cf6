"""Supervised fine-tuning: the likelihood of the completions.

Rows with `token_weights` (from stages, or turns with a `loss_scale`) are weighted accordingly.
"""

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._tokens import Tokens
from luthier.methods.objectives.preference._pairs import Probability
from luthier.registry import objective


@objective(
    requires=[COMPLETIONS, LOGPROBS],
    use_when="you have prompts with good answers, or plain text. Nearly every project starts here.",
    costs="one forward and backward pass over each row; the baseline of all other objectives.",
    starting_rate="that of the tuner: 1e-5 to 2e-5 for `full`, 1e-4 to 2e-4 for `lora`.",
)
class SFT(Tokens):
    """-log p of each supervised token. For a classifier this is cross-entropy, for a masked LM the cloze
    loss.
    """

    label_smoothing_factor: Probability = 0.0  # share of the target that is spread evenly over the vocabulary

    @property
    def active_requires(self):
        return self.requires | {TOPK} if self.label_smoothing_factor else self.requires

    def cost(self, roles, batch):
        cost = -roles.policy.logprobs(batch)
        if self.label_smoothing_factor:
            even = roles.policy.outputs(batch).apply(lambda z: -z.log_softmax(-1).mean(-1))
            cost = (1 - self.label_smoothing_factor) * cost + self.label_smoothing_factor * even
        return cost
