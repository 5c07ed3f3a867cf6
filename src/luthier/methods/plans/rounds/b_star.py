"""B-STaR: self-improvement whose temperature and threshold are chosen anew each round, so that the policy
goes on to find right answers (exploration) that the reward can tell from wrong ones (exploitation).

Each round: stage `balanced_rollout` picks the pair with the highest balance score on a few rows, samples all
rows with it, and the accepted different answers are learned by sft, from the last round's weights. Departs:
the optimizer's state is not carried over from round to round.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds
from luthier.registry import Range, plan, spec


@plan(
    paper="arXiv:2412.17256",
    row="b-star",
    use_when="a model learns from its own verified answers over several rounds and stops gaining after two"
    " or three of them.",
    costs="`rounds` times sampling `n` answers, as many of `probed` rows at each temperature, and a run.",
    covers="temperature and threshold by the balance score each round; pass@k, best-of-k, precision and"
    " diversity by round in the report.",
    omits="the optimizer's state over rounds; a process reward model: any reward selects.",
    tests=[
        "methods/plans/rounds/test_b_star.py::test_the_balance_score_by_hand",
        "methods/plans/rounds/test_b_star.py::test_the_grid_search_is_brute_force",
        "methods/plans/rounds/test_b_star.py::test_the_temperature_rises_and_diversity_stays",
    ],
)
class BStar(Rounds):
    """`rounds` times balanced_rollout, accept and the recipe's objective (sft)."""

    rounds: Annotated[int, Field(ge=1), Range(2, 9)] = 4  # maximum number of rounds
    n: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # completions of each prompt
    result: Literal["best", "last"] = "last"  # which round's model is the result
    temperatures: tuple[float, ...] = (0.5, 0.7, 0.9, 1.1)  # grid of temperatures
    thresholds: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # grid of thresholds
    probed: Annotated[int, Field(ge=1)] = 64  # rows on which the pair is chosen
    target: Annotated[int, Field(ge=1), Range(1, 8)] = 4  # right answers of a row that are wanted

    def sample(self, number):
        own = ("n", "max_new_tokens", "temperatures", "thresholds", "probed", "target")
        stage: dict[str, Any] = {name: spec(getattr(self, name)) for name in own}
        rewards = {"reward": spec(self.reward), "gold": spec(self.gold)}
        return [{"name": "balanced_rollout", **stage, **rewards, "draw": number}]

    def select(self, number):
        return [{"name": "accept", "most": self.target}]
