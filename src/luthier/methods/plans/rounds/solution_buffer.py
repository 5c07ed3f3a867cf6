"""Self-sampled solutions: in rounds, the policy writes programs, and learns the right ones and the right
beginnings beside the reference, with the likelihood of any of them.

Stage `solution_buffer` holds each row's buffer, which goes on from round to round; objective `mml` trains on
it. Departs: a round samples and then trains, where the paper samples while it trains.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2205.14318",
    row="self-sampled-partial-solutions",
    use_when="problems are solved by short programs, each has one reference solution, and several tries"
    " count (pass@k).",
    costs="`rounds` times sampling `n` programs, and a run over all solutions so far.",
    covers="the loop of sampling, executing and learning, with the buffers of all rounds.",
    omits="sampling within a round; the paper's models and data.",
    tests=[
        "methods/stages/rollout/test_solution_buffer.py::test_several_solutions_raise_pass_at_k",
    ],
)
class SolutionBufferRounds(Rounds):
    """`rounds` times solution_buffer and the recipe's objective (mml), each from the last one's end."""

    judged: Annotated[int, Field(ge=0)] = 0  # held-out prompts whose greedy answers judge a round; 0: none
    result: Literal["best", "last"] = "last"  # which round's model is the result
    n: Annotated[int, Field(ge=1), Range(2, 64, log=True)] = 8  # programs of each row
    partial: bool = True  # right beginnings too
    beta: Annotated[float, Field(ge=0, le=1), Range(0.0, 1.0)] = 0.0  # of objective mml; 0: all alike

    def sample(self, number):
        own = ("n", "max_new_tokens", "temperature", "partial")
        return [{"name": "solution_buffer", **{name: getattr(self, name) for name in own}, "draw": number}]

    def select(self, number):
        return []

    def aim(self, recipe):
        return recipe.objective or {"name": "mml", "beta": self.beta}

    def round(self, number, recipe, folders):
        request = super().round(number, recipe, folders)
        if not folders:
            return request
        stages: list[Any] = []
        for one in request.stages:
            fits = isinstance(one, dict) and one["name"] == "solution_buffer"
            stages.append({**one, "buffer": folders[-1]} if fits else one)
        return request.but(stages=stages)
