"""A new reward of outcomes without training: an outcome is drawn in proportion to its reward, and a policy
that learned to reach outcomes (objective `outcome_balance`) writes to it.

The policy of a new reward is sum_y r(y) F(s|y) p(token|s, y) / sum_y r(y) F(s|y) (Pan et al., 2024). A text
is built in one way only, so F(s|y) is F(start|y) times the probability of the text so far, and the sum is the
posterior mixture of the policies of all outcomes: to draw y in proportion to r(y) F(start|y) and to write
with y alone has the same distribution, at the cost of one text."""

from __future__ import annotations

import math
import random

from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.methods.stages.rollout.outcome_goals import ASK, asking
from luthier.registry import decoder


@decoder(
    paper="arXiv:2310.03419",
    row="oc-gflownet",
    use_when="a policy was trained by `outcome_balance`, and answers are wanted in proportion to a reward of"
    " their outcomes that it has never seen.",
    costs="what writing costs.",
    example={"rewards": {"short": 1.0, "long": 3.0}},
    covers="the exact policy of a new reward; one outcome alone is the policy of this outcome.",
    omits="the amortised sum: the draw makes it needless for texts.",
    tests=["methods/objectives/gflownet/test_outcomes.py::test_outcomes_are_drawn_in_proportion"],
)
class OutcomeMixture(Decoder):
    """Draws an outcome for each text, then asks for it."""

    rewards: dict[str, float]  # outcome -> its reward, 0 or more
    # outcome -> F(start|outcome), how many texts have it; null: 1, so that outcomes, not texts, are in
    # proportion to the reward
    flows: dict[str, float] | None = None
    ask: str = ASK  # how the prompt asks for an outcome, as in training

    def __post_init__(self):
        flows = self.flows or {}
        if any(not math.isfinite(value) or value < 0 for value in (*self.rewards.values(), *flows.values())):
            raise ValueError("rewards and flows must be finite and not negative")
        if not any(self.weights()):
            raise ValueError("rewards: at least one outcome must have a positive one")

    def weights(self) -> list[float]:
        """r(y) F(start|y) of each outcome."""
        flows = self.flows or dict.fromkeys(self.rewards, 1.0)
        missing = [outcome for outcome in self.rewards if outcome not in flows]
        if missing:
            raise RecipeError(f"decoder 'outcome_mixture': flows say nothing of outcome '{missing[0]}'")
        return [reward * flows[outcome] for outcome, reward in self.rewards.items()]

    def generate(self, roles, rows, prompts, **how):
        n, seeds = how.pop("n", 1), how.pop("seeds")
        outcomes, weights = list(self.rewards), self.weights()
        own, own_seeds = [], []
        for row, seed in zip(rows, seeds, strict=True):
            rng = random.Random(seed)
            for outcome in rng.choices(outcomes, weights, k=n):
                own.append(roles.renderer.prompt({**row, "prompt": asking(row["prompt"], self.ask, outcome)}))
                own_seeds.append(rng.getrandbits(31))
        texts = [written[0] for written in roles.policy.generate(own, n=1, seeds=own_seeds, **how)]
        return [texts[start : start + n] for start in range(0, len(texts), n)]
