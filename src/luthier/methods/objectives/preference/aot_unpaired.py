"""AOT without pairs: the sorted log-ratios of the chosen completions of a batch should exceed those of the
rejected ones.

The k-th smallest log-ratio of the chosen is compared with the k-th smallest of the rejected, whichever row
they come from. Sorted within one micro-batch, as in `aot`.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, Probability, best_and_worst, logistic
from luthier.methods.objectives.preference.aot import SORTED
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2406.05882",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    contract={"accumulation": SORTED},
    use_when="chosen and rejected completions do not answer the same prompts, so that only their"
    " distributions can be compared. It needs a micro-batch of many rows.",
    rate_factor=0.05,
)
class AOTUnpaired(Pairs):
    """Logistic loss of the k-th smallest log-ratio of the chosen minus the k-th smallest of the rejected."""

    label_smoothing: Probability = 0.0  # share of pairs that may be labelled the wrong way round

    def loss(self, roles, batch):
        best, worst = best_and_worst(batch)
        differ, values = best != worst, self.values(roles, batch)
        self.note(batch, values.detach(), best, worst)
        margins = values.new_zeros(len(best))
        margins[: int(differ.sum())] = (
            values[best[differ]].sort().values - values[worst[differ]].sort().values
        )
        return logistic(self.beta * margins, self.label_smoothing)
