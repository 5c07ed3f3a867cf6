"""DPO on pairs of steps of a tree search, each smoothed by how often its sides were visited (MCTS-DPO).

A pair whose sides were visited alike is a guess: its label counts as wrong with probability
min(1 - N_w / (N_w + N_l), 1/2). Log-ratios are summed over the steps; what both share is equal, so this is
the sum from the first token on in which they differ.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, best_and_worst, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import Column, objective

VISITS = Column("visits", per="completion", says="how often a search visited each side", example=(3, 1, 2))


@objective(
    paper="arXiv:2405.00451",
    row="mcts-dpo",
    requires=[PAIRS, VISITS, REFERENCE, LOGPROBS],
    use_when="pairs come from a tree search that counts how often it visited each side (stage `mcts_pairs`).",
    rate_factor=0.05,
    covers="the smoothed loss by visit counts.",
    tests=[
        "methods/stages/rollout/test_mcts_pairs.py::test_the_loss_is_dpo_smoothed_by_visits",
    ],
)
class MCTSDPO(Pairs):
    """-(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin), e by the visits of the pair."""

    def loss(self, roles, batch):
        values, visits = self.values(roles, batch), batch.column("visits")
        best, worst = best_and_worst(batch)
        self.note(batch, values.detach(), best, worst)
        counts = (visits[best] + visits[worst]).clamp(min=1)
        wrong = (1 - visits[best] / counts).clamp(0.0, 0.5)
        margin = self.beta * (values[best] - values[worst])
        return (1 - wrong) * logistic(margin) + wrong * logistic(-margin)
