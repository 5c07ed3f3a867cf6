"""Online iterative DPO: in rounds, the policy answers fresh prompts, a reward ranks its answers, and DPO is
trained on the best against the worst of each prompt (RLHF Workflow).

As in the paper: samples of the current policy, at several temperatures if wanted, so that the pairs explore;
ties are dropped; answers may be charged for their length before they are ranked; the reference is the model
that the plan starts from, or each round's start; the pairs of earlier rounds are trained on again if wanted;
a likelihood term on the chosen answers keeps these likely. `offline: true` begins with a round on the pairs
of the data, which is plain DPO. The supervised start and the reward model are runs of their own (objectives
`sft` and `reward`). Departs: exploration is by temperatures; no checkpoints of other rounds are sampled from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds, reference_at
from luthier.registry import Range, plan, spec


@plan(
    paper="arXiv:2405.07863",
    row="rlhf-workflow",
    use_when="you have prompts and a reward or reward model, and want preference optimization on the policy's"
    " own answers: stronger than DPO on given pairs, and simpler than PPO.",
    costs="`rounds` times sampling `n` answers, scoring them and a DPO run.",
    covers="rounds with fresh prompts, best against worst with a margin, length penalty, mixed temperatures,"
    " the reference at the start or at each round, all pairs or the newest, a likelihood term, an offline"
    " first round; the origin of every pair, and diversity by round.",
    omits="the paper's mixture of preference data, and samples of earlier checkpoints beside the current"
    " one; the pairwise preference model is reward `option_judge`.",
    tests=[
        "methods/plans/rounds/test_rlhf_workflow.py::test_the_reward_rises_round_by_round",
        "methods/plans/rounds/test_rlhf_workflow.py::test_an_offline_round_is_plain_dpo",
        "methods/plans/rounds/test_rlhf_workflow.py::test_rounds_on_a_network",
    ],
)
class RLHFWorkflow(Rounds):
    """`rounds` times rollout, score, pairs and dpo, each from the last one's end."""

    fresh_prompts: bool = True  # give each round prompts of its own
    result: Literal["best", "last"] = "last"  # which round's model is the result
    temperatures: tuple[float, ...] = ()  # sample at several temperatures, the n shared among them
    margin: Annotated[float, Field(ge=0)] = 0.0  # pairs whose scores differ by this or less are dropped
    length_penalty: Annotated[float, Field(ge=0)] = 0.0  # subtracted from the score for each word
    reference: Literal["start", "round"] = "start"  # reference: what the plan, or each round, starts from
    beta: Annotated[float, Field(gt=0), Range(0.01, 1.0, log=True)] = 0.1  # beta of dpo
    likelihood: Annotated[float, Field(ge=0)] = 0.0  # weight of sft on the chosen answers
    offline: bool = False  # train the first round on the pairs of the data

    def sample(self, number):
        stages = super().sample(number)
        rewards: list[Any] = [spec(self.reward)]
        if self.length_penalty:
            rewards.append({"name": "length", "scale": -self.length_penalty})
        stages[1]["reward"] = rewards
        if self.temperatures:
            stages[0].pop("temperature")
            stages[0] |= {"name": "mixed_temperatures", "temperatures": list(self.temperatures)}
        return stages

    def select(self, number):
        return [{"name": "pairs", "margin": self.margin}]

    def aim(self, recipe):
        dpo = {"name": "dpo", "beta": self.beta}
        return [dpo, {"name": "chosen_sft", "weight": self.likelihood}] if self.likelihood else dpo

    def changes(self, number, recipe, last):
        changes: dict[str, Any] = {"roles": reference_at(self.reference, recipe)}
        if self.offline and number == 0:
            changes["stages"] = list(recipe.stages)
        return changes
