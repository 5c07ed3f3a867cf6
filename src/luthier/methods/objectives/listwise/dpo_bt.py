"""DPO over every pair of a ranked list, not only the best against the worst (pairwise logistic, DPO-BT)."""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives.listwise._lists import Lists, by_row, ordered
from luthier.methods.objectives.preference._pairs import logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2402.01878",
    row="lipo-lambda",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    use_when="a row ranks more than two completions and every pair among them should count.",
    rate_factor=0.05,
)
class DPOBT(Lists):
    """-log sigmoid(s_i - s_j) of each pair in which i has the higher score."""

    mean: bool = True  # mean over a row's pairs; false: sum

    def cost(self, values, batch):
        better, worse = ordered(batch)
        return by_row(batch, better, logistic(values[better] - values[worse]), self.mean)
