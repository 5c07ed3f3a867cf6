"""MODPO: DPO for one goal, with a margin for the other goals. One model for each choice of weights.

The pairs are ranked by the goal that is trained. Scores for the other goals are in the column `rewards`
({name: a number per completion}), written by the stages `score` (reward models, or rules such as a length)
and `implicit_reward` (a policy trained for that goal). Vary `weights` to get a Pareto front of models.
"""

from dataclasses import field
from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, best_and_worst, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import REWARDS
from luthier.registry import objective


@objective(
    paper="arXiv:2310.03708",
    row="modpo",
    requires=[PAIRS, REWARDS, REFERENCE, LOGPROBS],
    use_when="there are several goals and pairs for one of them: one run for each weighting gives a"
    " set of trade-offs (plan `front`).",
    covers="margins of further goals in the loss, and a front of models.",
    tests=[
        "methods/objectives/preference/test_modpo.py::test_modpo_finds_the_policy_of_the_weighted_reward",
        "methods/plans/studies/test_front.py::test_goals_enter_by_margins_or_by_sums",
    ],
    rate_factor=0.05,
)
class MODPO(Pairs):
    """-log sigmoid((beta * margin - sum of weights_j * (r_j of the best - r_j of the worst)) / w), w = 1 -
    sum of weights.
    """

    # weight of each other goal, by its name in `rewards`
    weights: dict[str, Annotated[float, Field(ge=0)]] = field(default_factory=dict)

    def __post_init__(self):
        if sum(self.weights.values()) >= 1:
            raise ValueError(
                "weights: they add up to 1 or more, which leaves nothing for the goal that ranks the pairs"
            )

    def loss(self, roles, batch):
        values = self.values(roles, batch)
        best, worst = best_and_worst(batch)
        self.note(batch, values.detach(), best, worst)
        others = sum(
            (w * batch.reward(name) for name, w in self.weights.items()), values.new_zeros(len(values))
        )
        total = (self.beta * values - others) / (1 - sum(self.weights.values()))
        return logistic(total[best] - total[worst])
