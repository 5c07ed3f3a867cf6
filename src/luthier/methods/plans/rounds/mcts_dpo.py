"""MCTS-DPO: in rounds, the policy searches for solutions step by step, and learns to prefer the steps that
its search favours.

Each round searches with the policy as it is (stage `mcts_pairs`) and trains by objective `mcts_dpo`; the
reference stays what the plan starts from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds, reference_at
from luthier.registry import Range, plan, spec


@plan(
    paper="arXiv:2405.00451",
    row="mcts-dpo",
    use_when="solutions have several steps, their ends can be checked, and pairs of whole answers no longer"
    " help.",
    costs="`rounds` times a tree of `iterations` turns for each prompt, and a preference run.",
    covers="online collection and update in rounds, the start as the reference.",
    omits="the gains on GSM8K, MATH and ARC, which are not repeated.",
    tests=["methods/plans/rounds/test_mcts_dpo.py::test_rounds_search_with_the_policy_as_it_is"],
)
class MCTSDPO(Rounds):
    """`rounds` times mcts_pairs and mcts_dpo, each from the last one's end."""

    fresh_prompts: bool = True  # give each round prompts of its own
    result: Literal["best", "last"] = "last"  # which round's model is the result
    iterations: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # turns of the search
    depth: Annotated[int, Field(ge=1), Range(2, 8)] = 3  # steps of a solution at most
    separator: str = "\n"  # text that ends a step
    exploration: Annotated[float, Field(ge=0), Range(0.2, 4.0, log=True)] = 1.0  # c of the search
    confidence: Annotated[float, Field(ge=0)] = 1.0  # weight of self-evaluation; 0: it is not asked
    n: Annotated[int, Field(ge=2), Range(2, 5)] = 2  # steps that are sampled at each node
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of a step
    reference: Literal["start", "round"] = "start"  # reference: what the plan, or each round, starts from
    beta: Annotated[float, Field(gt=0), Range(0.01, 1.0, log=True)] = 0.1  # beta of the objective

    def sample(self, number):
        own = ("iterations", "depth", "separator", "exploration", "confidence", "temperature")
        stage: dict[str, Any] = {name: spec(getattr(self, name)) for name in own}
        stage |= {"width": self.n, "step_tokens": self.max_new_tokens, "reward": spec(self.reward)}
        return [{"name": "mcts_pairs", **stage, "draw": number}]

    def select(self, number):
        return []

    def judging(self):
        return {**super().judging(), "max_new_tokens": self.max_new_tokens * self.depth}

    def aim(self, recipe):
        return {"name": "mcts_dpo", "beta": self.beta}

    def changes(self, number, recipe, last) -> dict[str, Any]:
        return {"roles": reference_at(self.reference, recipe)}
