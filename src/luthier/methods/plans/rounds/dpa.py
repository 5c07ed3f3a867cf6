"""Directional preference alignment: rejection sampling for every direction in the space of several rewards.

Each round every prompt gets a direction (stage `draw_direction`), the policy answers under it, and the
answer with the highest reward in this direction is learned by sft, with the direction before the prompt. At
inference the direction is a line of arithmetic in the prompt. Rewards should have comparable scales (reward
`scaled`). Departs: rewards are separate methods, where the paper trains one regression model with a head for
each.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds
from luthier.registry import Range, plan, spec


@plan(
    paper="arXiv:2402.18571",
    row="dpa",
    use_when="several rewards conflict, and each user is to choose the trade-off when he asks.",
    costs="`rounds` times sampling `n` answers, scoring them by each reward, and a supervised run.",
    covers="unit directions in the prompt, best-of-n by the inner product with the rewards, in rounds.",
    omits="the reward model with several heads and masked missing attributes; rounds are judged by the"
    " paper's benchmarks there and, here, not unless `reward` is set.",
    tests=[
        "methods/plans/rounds/test_dpa.py::test_the_best_is_the_argmax_of_the_inner_product",
        "methods/plans/rounds/test_dpa.py::test_length_follows_the_direction_after_two_rounds",
        "methods/plans/rounds/test_dpa.py::test_the_first_axis_alone_is_plain_rejection_sampling",
    ],
)
class DPA(Rounds):
    """`rounds` times draw_direction, rollout, score, scalarize, best and the recipe's objective (sft)."""

    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 2  # maximum number of rounds
    n: Annotated[int, Field(ge=1), Range(8, 80, log=True)] = 16  # completions of each prompt
    judged: Annotated[int, Field(ge=0)] = 0  # held-out prompts for `reward`, without a direction; 0: none
    result: Literal["best", "last"] = "last"  # which round's model is the result
    rewards: Annotated[tuple[Any, ...], Field(min_length=2)] = ("exact_match", "length")  # what is traded
    names: tuple[str, ...] | None = None  # of the rewards, as they stand in the prompt; null: the methods'
    degrees: Annotated[float, Field(ge=0, le=180), Range(15, 90)] = 45.0  # largest angle to the first axis

    def __post_init__(self):
        if self.names is not None and len(self.names) != len(self.rewards):
            raise ValueError(f"names: {len(self.names)} names for {len(self.rewards)} rewards")
        if len(set(self.labels())) < len(self.rewards):
            raise ValueError(f"names: give each of the {len(self.rewards)} rewards a name of its own")

    def labels(self) -> list[str]:
        """What the rewards are called in the prompt."""
        if self.names is not None:
            return list(self.names)
        specs = [spec(reward) for reward in self.rewards]
        return [one["name"] if isinstance(one, dict) else str(one) for one in specs]

    def sample(self, number):
        direction = {"name": "draw_direction", "names": self.labels(), "degrees": self.degrees}
        rewards = [spec(reward) for reward in self.rewards]
        return [
            {**direction, "draw": number},
            super().sample(number)[0],
            {"name": "score", "reward": rewards, "names": self.labels()},
            {"name": "scalarize", "names": self.labels()},
        ]

    def select(self, number):
        return ["best"]
