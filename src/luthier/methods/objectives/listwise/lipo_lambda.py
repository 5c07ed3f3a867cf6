"""LiPO with lambda weights: every pair of a ranked list is weighted by how much swapping the two would change
the DCG.

Scores are labels in [0, 1], such as a reward model's win rates. Ranks follow the policy's current values.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives.listwise._lists import Lists, by_row, ordered, rank
from luthier.methods.objectives.preference._pairs import logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2402.01878",
    row="lipo-lambda",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    use_when="a row ranks several completions with scores in [0, 1] and the order at the top matters most.",
    covers="the lambda-weighted loss over ranked lists; `lipo_softmax`, `dpo_bt` and `dpo_pl` beside it.",
    omits="a comparison with another library's lambda loss.",
    tests=[
        "methods/objectives/listwise/test_lists.py::test_lambda_weights_by_hand",
        "methods/objectives/listwise/test_lists.py::test_a_list_of_two_is_dpo_times_its_weight",
        "methods/objectives/listwise/test_lists.py::test_ranking_lists_beats_random_pairs_of_them",
    ],
    rate_factor=0.05,
)
class LiPO(Lists):
    """Sum over pairs of |2^score_i - 2^score_j| * |1 / log(1 + rank_i) - 1 / log(1 + rank_j)| * -log
    sigmoid(s_i - s_j).
    """

    mean: bool = False  # mean over a row's pairs; false: sum

    def cost(self, values, batch):
        better, worse = ordered(batch)
        gain, discount = 2 ** batch.column("scores"), 1 / (1 + rank(batch, values.detach())).log()
        weight = (gain[better] - gain[worse]) * (discount[better] - discount[worse]).abs()
        return by_row(batch, better, weight * logistic(values[better] - values[worse]), self.mean)
