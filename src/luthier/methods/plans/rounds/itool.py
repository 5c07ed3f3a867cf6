"""iTool: in rounds, the rows that are hardest for the policy are searched for tool calls step by step, and
the better steps are preferred.

Each round keeps the share of rows whose reference has the highest perplexity (stages `perplexity` and
`top`), searches them (stage `itool_pairs`) and trains by `simpo`. The supervised warm-up from easy to hard
is a run, or several, before it (plan `sequence`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2501.09766",
    row="itool",
    use_when="supervised tuning on tool calls has stopped gaining on the hard ones.",
    costs="`rounds` times a reading of all rows, a search on a share of them, and a preference run.",
    covers="hard rows by perplexity, search, preference optimization, in rounds.",
    omits="the warm-up by difficulty as a part of the plan; BFCL and API-Bank; the gain over more sft,"
    " which is"
    " not measured.",
    tests=["methods/stages/rollout/test_itool_pairs.py::test_rounds_search_the_hardest_rows"],
)
class ITool(Rounds):
    """`rounds` times perplexity, top, itool_pairs and simpo, each from the last one's end."""

    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 2  # maximum number of rounds
    judged: Annotated[int, Field(ge=0)] = 0  # held-out prompts whose greedy answers judge a round; 0: none
    result: Literal["best", "last"] = "last"  # which round's model is the result
    share: Annotated[float, Field(gt=0, le=1), Range(0.1, 1.0)] = 0.3  # of the rows, the hardest
    iterations: Annotated[int, Field(ge=1), Range(3, 20)] = 5  # turns of the search
    n: Annotated[int, Field(ge=2), Range(2, 5)] = 3  # steps that are sampled at each node
    temperature: Annotated[float, Field(gt=0)] = 1.5  # sampling temperature
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of a step
    depth: Annotated[int, Field(ge=1), Range(2, 8)] = 3  # steps of a call at most
    separator: str = ","  # text that ends a step
    gap: Annotated[float, Field(ge=0)] = 0.1  # least difference of two values
    beta: Annotated[float, Field(gt=0), Range(1.0, 10.0)] = 2.5  # beta of simpo

    def sample(self, number) -> list[Any]:
        own = ("iterations", "temperature", "depth", "separator", "gap")
        search: dict[str, Any] = {name: getattr(self, name) for name in own}
        search |= {"width": self.n, "step_tokens": self.max_new_tokens, "draw": number}
        hardest = {"name": "top", "by": ["perplexity"], "share": self.share, "prefer": "high"}
        return ["perplexity", hardest, {"name": "itool_pairs", **search}]

    def select(self, number):
        return []

    def aim(self, recipe):
        return {"name": "simpo", "beta": self.beta}
