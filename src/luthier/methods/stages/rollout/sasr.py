"""Chooses for each step whether it learns from demonstrations or from scored samples, by how far the policy
is from the demonstrations (SASR).

Departs from the paper, whose code is not public: the choice is made by role `supervised_share`, and
constants are the user's.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.clock import Clock
from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles.averages.supervised_share import SUPERVISED_SHARE
from luthier.methods.stages._base import SAMPLES, Stage, without
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.methods.stages.rollout.score import Score
from luthier.registry import Column, Range, nested, stage

DEMONSTRATION = Column(
    "demonstration", says="whether completions are given ones (stage sasr)", example=(True, False)
)


@stage(
    paper="arXiv:2505.13026",
    row="sasr",
    contract={"gives": "it needs role supervised_share, which the recipe names"},
    requires=[COMPLETIONS, GENERATE, SUPERVISED_SHARE],
    provides=[COMPLETIONS, SAMPLES, SCORES, DEMONSTRATION],
    removes=[PAIRS],
    use_when="prompts have both demonstrations and a reward, and neither SFT before RL nor a fixed"
    " mixture serves: under `online_stages`, with objective `sasr`.",
    costs="in steps of reinforcement, `n` samples of each prompt and their reward.",
    covers="the warm-up and the choice of each step.",
    omits="the paper's gain over SFT and GRPO alone, which is not measured.",
    tests=[
        "methods/stages/rollout/test_sasr.py::test_steps_are_chosen_as_often_as_their_share_says",
        "methods/stages/rollout/test_sasr.py::test_gamma_leads_from_sft_to_grpo",
    ],
)
class SASR(Stage):
    """Column `demonstration`; the completions of the row with score 0, or samples with theirs."""

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores samples
    n: Annotated[int, Field(ge=2), Range(2, 32, log=True)] = 8  # samples of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a sample
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature

    def __call__(self, rows, roles):
        rows, switch = list(rows), roles.supervised_share
        share = switch.share(roles.clock.step)
        supervised = is_supervised(roles.clock, share)
        switch.supervised.fill_(float(supervised))
        if not supervised:
            rollout = Rollout(n=self.n, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
            rows = list(Score(reward=(self.reward,))(rollout(rows, roles), roles))
        for row in rows:
            if supervised:
                row = {**without(row), "completions": row["completions"]}
                row["scores"] = [0.0] * len(row["completions"])
            yield {**row, "demonstration": supervised, "supervised_share": share}


def is_supervised(clock: Clock, share: float) -> bool:
    """The draw of this step, which happens with this probability."""
    return clock.derive_seed("sasr") % 2**20 < share * 2**20
