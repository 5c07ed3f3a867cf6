"""LETI: in rounds, the policy writes programs, tests and interpreter say what is wrong with them, and it
learns programs and sayings as text.

Stage `leti` makes a round's rows. The model is asked behind the token of good programs, so held-out prompts
should begin with it. Departs: the paper mixes pretraining batches in; here `accumulate` trains on the rows
of earlier rounds again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2305.10314",
    row="leti",
    use_when="problems have tests, and pass or fail alone teaches too slowly.",
    costs="`rounds` times sampling `n` programs, running them, and a supervised run on all.",
    covers="the loop of writing, running and learning, with reward tokens and textual feedback.",
    omits="pretraining batches as a regulariser; the paper's models.",
    tests=["methods/stages/rollout/test_leti.py::test_rounds_write_with_the_policy_as_it_is"],
)
class LETIRounds(Rounds):
    """`rounds` times leti and the recipe's objective (sft), each from the last one's end."""

    reward: Any = "python_tests"  # the reward that judges a round
    judged: Annotated[int, Field(ge=0)] = 0  # held-out prompts whose greedy answers judge a round; 0: none
    max_new_tokens: Annotated[int, Field(ge=1)] = 256  # maximum tokens of a program
    result: Literal["best", "last"] = "last"  # which round's model is the result
    textual: bool = True  # write the feedback; false: reward tokens alone
    prefix: str = ""  # column put before the code, such as prompt where the model completes a function
    timeout: Annotated[float, Field(gt=0), Range(1, 10)] = 5.0  # maximum seconds of a program and its tests

    def sample(self, number):
        own = ("n", "max_new_tokens", "temperature", "textual", "prefix", "timeout")
        return [{"name": "leti", **{name: getattr(self, name) for name in own}, "draw": number}]

    def select(self, number):
        return []
