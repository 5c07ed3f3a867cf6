"""Sharpening: a model improves itself by learning the answers that it finds likeliest, without any reward.

The self-reward is the log-probability under the model that the plan starts from. `form: sft` trains on the
best of n samples by it; that finds the likeliest answer where n is of the order of 1 / its probability
(the paper's coverage). `form: rl` fits all samples by objective `rebel`, whose optimum is the starting model
to the power 1 + 1 / beta. Departs: rounds, where the paper has one; samples of later rounds come from the
sharpened model, the self-reward stays that of the start.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds, reference_at
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2412.01951",
    row="sharpening",
    use_when="there is no reward and no verifier, and the model is right more often in its likeliest answer"
    " than in its samples: what best-of-n by likelihood gains is learned once.",
    costs="`rounds` times sampling `n` answers, a forward pass over them and a run.",
    covers="SFT-sharpening and RLHF-sharpening, length-normalised or not, in rounds; diversity is watched.",
    omits="the exploration bonus (objective `xpo` has it for two samples); majority as the self-reward; the"
    " paper's models.",
    tests=[
        "methods/plans/rounds/test_sharpening.py::test_the_best_of_many_is_the_likeliest",
        "methods/plans/rounds/test_sharpening.py::test_the_optimum_is_the_power_of_the_base",
        "methods/plans/rounds/test_sharpening.py::test_samples_become_likelier_under_the_base",
    ],
)
class Sharpening(Rounds):
    """`rounds` times rollout, likelihood, and sft on the best or rebel on all."""

    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 1  # maximum number of rounds
    result: Literal["best", "last"] = "last"  # which round's model is the result
    judged: Annotated[int, Field(ge=0)] = 0  # held-out prompts for `reward`, where there is one; 0: none
    form: Literal["sft", "rl"] = "sft"  # learn the best sample, or fit all of them
    per_token: bool = False  # the self-reward is a mean over tokens, not a sum
    beta: Annotated[float, Field(gt=0), Range(0.1, 10.0, log=True)] = 1.0  # of `form: rl`

    def sample(self, number):
        return [super().sample(number)[0], {"name": "likelihood", "per_token": self.per_token}]

    def select(self, number):
        return ["best"] if self.form == "sft" else []

    def aim(self, recipe):
        return {"name": "rebel", "beta": self.beta} if self.form == "rl" else super().aim(recipe)

    def changes(self, number, recipe, last) -> dict[str, Any]:
        return {"roles": reference_at("start", recipe)}
