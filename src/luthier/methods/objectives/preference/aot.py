"""AOT: aligns the distribution of margins in a batch, sorted, with the reference's, instead of comparing pair
by pair.

Margins are sorted within one micro-batch, so results depend on the micro-batch size; with one row per
micro-batch it equals DPO. Rows whose completions have equal scores are left out.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, Probability, best_and_worst, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective

SORTED = "margins are sorted within one micro-batch"


@objective(
    paper="arXiv:2406.05882",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    contract={"accumulation": SORTED},
    use_when="pairs are noisy one by one but good as a set: it compares sorted margins of a"
    " micro-batch, and needs a micro-batch of many rows.",
    rate_factor=0.05,
)
class AOT(Pairs):
    """Logistic loss of the k-th smallest margin of the policy minus the k-th smallest of the reference."""

    label_smoothing: Probability = 0.0  # share of pairs that may be labelled the wrong way round

    def loss(self, roles, batch):
        best, worst = best_and_worst(batch)
        differ = best != worst
        own, other = (batch.sums(who.logprobs(batch)) for who in (roles.policy, roles.reference))
        self.note(batch, (own - other).detach(), best, worst)
        sorts = [(x[best] - x[worst])[differ].sort().values for x in (own, other)]
        margins = own.new_zeros(len(best))
        margins[: len(sorts[0])] = sorts[0] - sorts[1]
        return logistic(self.beta * margins, self.label_smoothing)
