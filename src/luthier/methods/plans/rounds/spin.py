"""SPIN: in rounds, the policy learns to prefer the given answer to its own of the round before. Needs only
SFT rows.

Each round samples from its own initial policy, which is also its reference: at the first step the loss is log
2. From the second round on, the pairs of the previous round are trained on again, as in the paper. Departs:
one epoch count and one learning rate for all rounds, and the recipe's optimizer (the paper: RMSProp, 2
epochs, a smaller rate later).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.plans._base import Plan, one_epoch
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2401.01335",
    row="spin",
    use_when="you have only SFT rows and SFT has ended: self-play against the model's own answers may"
    " gain more.",
    costs="`rounds` times sampling one answer for each row and a DPO run.",
    covers="rounds of self-play with the round's start as reference, and pairs of the round before.",
    omits="RMSProp and the rates by round of the paper.",
    tests=[
        "methods/plans/rounds/test_spin.py::test_spin_begins_each_round_at_log_two",
        "methods/plans/rounds/test_spin.py::test_rounds_approach_the_data_and_stay_there",
        "methods/plans/rounds/test_spin.py::test_at_the_data_the_gradient_is_zero_as_that_of_more_sft",
        "methods/plans/rounds/test_spin.py::test_learning_to_prefer_what_is_said_anyway_changes_nothing",
    ],
)
class SPIN(Plan):
    """`rounds` times against_self and dpo, each continuing from the last."""

    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 3  # number of self-play rounds
    beta: float | list[float] = 0.1  # beta of dpo (lambda in the paper); a list gives one per round
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a sampled answer
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature
    mix_last: bool = True  # train on the pairs of the previous round again

    def __post_init__(self):
        if isinstance(self.beta, list) and len(self.beta) != self.rounds:
            raise ValueError(f"beta: {len(self.beta)} values for {self.rounds} rounds; give one for each")

    def recipes(self, recipe):
        last = None
        sampling = {
            "name": "against_self",
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }
        for draw in range(self.rounds):
            stage = {**sampling, "draw": draw, "earlier": last if self.mix_last else None}
            beta = self.beta[draw] if isinstance(self.beta, list) else self.beta
            roles = {**recipe.roles, "reference": "initial"}
            aim = {"name": "dpo", "beta": beta}
            report = yield recipe.but(
                stages=[*recipe.stages, stage],
                objective=aim,
                roles=roles,
                init_from=last or recipe.init_from,
                **one_epoch(recipe),
            )
            last = report.folder
