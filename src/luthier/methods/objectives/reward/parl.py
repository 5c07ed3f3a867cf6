"""PARL: a reward model that knows that the policy, and with it the pairs that are judged, follows from it.

Alignment is bilevel (Chakraborty et al., 2024): the reward is fitted to preferences over answers of the
policy that is best for this very reward. The gradient has two terms, that of the preference loss with the
answers held, and that of the distribution which the answers are drawn from; the usual loop of reward model
and reinforcement learning drops the second. Departs: where the paper approximates an inverse Hessian, the
policy here is the optimum under a KL penalty of weight `beta`, a softmax of reward / beta over the reference,
for which this product has a closed form: d log policy(y) = (d r(y) - mean of d r) / beta.

A row's completions are samples of that policy, at least three, so that the mean is estimated without bias
from those beside the pair; of rows with fewer, a sentence before training says that they are learned without
the second term, and a stage that would draw fewer is refused. `scores` say which of two the judge prefers.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import VALUES
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.registry import Range, objective, provides_of


@objective(
    paper="arXiv:2308.02585",
    row="parl",
    requires=[COMPLETIONS, SCORES, VALUES],
    use_when="a reward model is fitted to the newest samples of the policy that it trains, round by round,"
    " and judgements are few.",
    costs="a forward and backward pass over every completion, on a network with a scalar head.",
    starting_rate="that of `reward`.",
    rate_factor=0.5,
    covers="the preference loss with the distribution term, unbiased, for a lower level that is a policy"
    " under a KL penalty; without the term it is the mean over all pairs.",
    omits="the inverse Hessian of a general policy by Neumann series or conjugate gradients, control tasks,"
    " the loop as one plan (reward model and policy take turns as runs of plan `sequence`), and that fewer"
    " judgements are needed, which is not measured.",
    tests=[
        "methods/objectives/reward/test_parl.py::test_the_gradient_is_that_of_finite_differences",
        "methods/objectives/reward/test_parl.py::test_the_term_changes_no_value",
    ],
)
class PARL(Objective):
    """-log sigmoid of the preferred difference over all pairs of a row, with the gradient of where answers
    come from.
    """

    unit = "group"

    # weight of the KL penalty under which the policy is trained; a large one lets the policy follow little
    beta: Annotated[float, Field(gt=0), Range(0.05, 2.0, log=True)] = 0.5
    distribution: bool = True  # false: the preference loss alone

    def suits_recipe(self, recipe, methods):
        for stage in methods.online_stages:
            draws = getattr(stage, "n", 3)
            if self.distribution and "completions" in provides_of(stage) and draws < 3:
                raise RecipeError(
                    f"objective 'parl' needs three or more samples of each prompt, and stage '{stage.name}'"
                    f" draws {draws}; set `n: 3` or more, or `distribution: false`"
                )

    def row_warnings(self, rows):
        few = sum(len(row["completions"]) < 3 for row in rows)
        if not self.distribution or not few:
            return []
        return [
            f"objective 'parl': {few:,} of {len(rows):,} rows have fewer than three completions; these are"
            " learned by the preference loss alone, without the distribution term"
        ]

    def loss(self, roles, batch):
        rewards = batch.last(roles.policy.outputs(batch).values)
        scores = batch.column("scores")
        losses, first = [], 0
        for row in batch.rows:
            count = len(row["completions"])
            own = slice(first, first + count)
            losses.append(self.cost(rewards[own], scores[own]))
            first += count
        batch.note(reward=rewards)
        return torch.stack(losses)

    def cost(self, rewards: Tensor, scores: Tensor) -> Tensor:
        """[n], [n] -> [] of one row: the mean over its ordered pairs."""
        n = len(rewards)
        apart = 1 - torch.eye(n, device=rewards.device)
        preferred = (torch.sign(scores[:, None] - scores) + 1) / 2
        gap = rewards[:, None] - rewards
        pairs = F.binary_cross_entropy_with_logits(gap, preferred, reduction="none") * apart
        value = pairs.sum() / max(1, n * (n - 1))
        if not self.distribution or n < 3:  # nobody beside the pair tells the mean
            return value
        both = rewards[:, None] + rewards
        others = (rewards.sum() - both) / (n - 2)  # the mean of those that are not in the pair
        moved = (pairs.detach() * (both - 2 * others)).sum() / (n * (n - 1) * self.beta)
        return value + moved - moved.detach()
