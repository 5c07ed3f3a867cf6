"""Outcome-conditioned GFlowNets: before any reward is known, a policy learns to reach every outcome that it
is asked for, by as many ways as lead there.

Stage `outcome_goals` asks for the outcome that a sample had (score 1) and for another one's (score 0). A
state s has a flow F(s|y), which the critic learns as a logarithm, and flow, policy and outcome must
balance: log F(s|y) + log p(rest of the text | s, y) = log R(x|y), with R the score, smoothed. For a new
reward of outcomes nothing is trained: decoder `outcome_mixture` draws outcomes in proportion to it.
Departs: Pan et al. (2024) balance single transitions and let the outcome into each of them, since it would
have to travel back from the end; here each state is balanced with the end directly, which serves the same
purpose and, where a text is built in one way only, has an exact solution."""

import math
from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.roles._base import CRITIC
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2310.03419",
    row="oc-gflownet",
    requires=[COMPLETIONS, SCORES, CRITIC, LOGPROBS],
    use_when="many rewards are to come that are functions of an outcome (a class, a form, a number), and one"
    " policy is to serve all of them without further training.",
    costs="a forward and backward pass over every completion, and the critic.",
    starting_rate="that of `grpo`, or up to ten times as much.",
    rate_factor=0.1,
    covers="the balance of flow, policy and outcome from each state, own and foreign outcomes of samples, and"
    " the exact policy of a new reward.",
    omits="the balance of single transitions, exploration by an intrinsic reward (samples are the policy's"
    " own, or given), and the predictor that amortises the sum over outcomes: for texts, which are built in"
    " one way only, a draw of the outcome has the same distribution.",
    tests=[
        "methods/objectives/gflownet/test_outcomes.py::test_outcomes_are_reached_and_rewards_followed",
        "methods/objectives/gflownet/test_outcomes.py::test_the_balanced_flow_costs_nothing",
        "methods/objectives/gflownet/test_outcomes.py::test_the_sum_over_outcomes_is_the_mixture",
        "methods/objectives/gflownet/test_outcomes.py::test_samples_are_asked_for_their_own_outcome",
        "methods/objectives/gflownet/test_outcomes.py::test_outcomes_are_drawn_in_proportion",
    ],
)
class OutcomeBalance(Objective):
    """(log F(s|y) + log p(rest | s, y) - log R(x|y))^2 of each token's state."""

    unit = "token"

    # what a missed outcome scores in place of 0, whose logarithm is none
    least: Annotated[float, Field(gt=0, lt=1), Range(1e-6, 1e-2, log=True)] = 1e-3

    def loss(self, roles, batch):
        flow = roles.critic.values(roles.policy, batch)
        rest = batch.suffix(roles.policy.logprobs(batch))
        reached = batch.column("scores").clamp(min=self.least).log()
        batch.note(flow=flow, reached=(reached > math.log(self.least)).float())
        return (flow + rest - reached[batch.owner]).square()
