"""Reward-weighted regression: likelihood of every completion, weighted by its score relative to its row.

There is no negative gradient: a bad completion only has less weight. Departs: weights are a softmax within
the row, so scores of any scale work and equal scores are plain SFT.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta
from luthier.registry import objective


@objective(
    paper="arXiv:2404.14367",
    row="onpolicy-negative-gradient",
    requires=[COMPLETIONS, SCORES, LOGPROBS],
    use_when="completions have scores and you want a stable method without negative gradients.",
    costs="a forward and backward pass over every completion.",
    starting_rate="that of `sft`.",
    covers="reward-weighted regression, and on a bandit the comparison of objectives with samples on and"
    " off policy.",
    tests=[
        "methods/objectives/listwise/test_rwr.py::test_rwr_between_sft_and_the_best",
        "methods/objectives/listwise/test_rwr.py::test_rows_without_a_ranking_are_told",
    ],
)
class RWR(Objective):
    """n * softmax(score / beta) * -log p of a completion, n completions in the row."""

    unit = "sequence"

    beta: Beta = 1.0  # temperature of the scores; large: plain SFT, small: only the best completion

    def row_warnings(self, rows):
        if any(len(set(row.get("scores", ()))) > 1 for row in rows):
            return []
        return [
            "objective 'rwr': no row has completions of different score, so every score has the same weight"
            " and this is plain SFT; give rows several scored completions, or filter them by score"
        ]

    def loss(self, roles, batch):
        x = batch.column("scores") / self.beta
        weight = (x - batch.over_group(x, "amax")).exp()
        return -weight / batch.over_group(weight, "mean") * batch.sums(roles.policy.logprobs(batch))
