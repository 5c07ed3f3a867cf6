"""Self-rationalization: a judge improves by preferring those of its own judgements that end in the right
rating.

Each round the judge writes `n` judgements of every row, a rationale and then a rating; stage `rating_pairs`
pairs right ones with wrong ones, and DPO learns the whole text. The reference is what a round starts from.
Where every judgement is right there are no pairs, and the plan ends. The seed judge is a supervised run of
its own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds, reference_at
from luthier.registry import Range, plan, spec


@plan(
    paper="arXiv:2410.05495",
    row="self-rationalization-judge",
    use_when="a tuned judge writes rationales and ratings, and rows have right ratings (or several judgements"
    " agree).",
    costs="`rounds` times sampling `n` judgements and a DPO run.",
    covers="rounds of judgements, pairs with a margin by the right rating or the majority's, dpo on the whole"
    " text, and the share of right ratings on held-out rows.",
    omits="pairs by a meta-judge; correlation on BiGGen Bench and RewardBench; win rates of rationales.",
    tests=[
        "methods/plans/rounds/test_self_rationalization.py::test_two_rounds_make_a_better_judge",
        "methods/plans/rounds/test_self_rationalization.py::test_it_ends_where_every_judgement_is_right",
    ],
)
class SelfRationalization(Rounds):
    """`rounds` times rollout, rating_pairs and dpo, each from the last one's end."""

    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 2  # maximum number of rounds
    n: Annotated[int, Field(ge=2), Range(4, 32, log=True)] = 10  # judgements of each row
    # what judges a round: the last number of a judgement against the row's answer
    reward: Any = None
    result: Literal["best", "last"] = "last"  # which round's model is the result
    by: Literal["answer", "majority"] = "answer"  # what a right rating is
    margin: Annotated[float, Field(gt=0), Range(1.0, 3.0)] = 1.0  # least distance of a rejected rating
    most: Annotated[int, Field(ge=1)] = 1  # pairs of a row at most
    reference: Literal["start", "round"] = "round"  # reference: what the plan, or each round, starts from
    beta: Annotated[float, Field(gt=0), Range(0.01, 1.0, log=True)] = 0.1  # beta of dpo

    def sample(self, number):
        return super().sample(number)[:1]

    def select(self, number):
        return [{"name": "rating_pairs", "by": self.by, "margin": self.margin, "most": self.most}]

    def aim(self, recipe):
        return {"name": "dpo", "beta": self.beta}

    def judging(self):
        right = self.reward or {"name": "exact_match", "extract": "last_number"}
        return {**super().judging(), "reward": spec(right)}

    def changes(self, number, recipe, last) -> dict[str, Any]:
        return {"roles": reference_at(self.reference, recipe)}
