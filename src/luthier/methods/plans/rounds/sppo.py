"""SPPO: in rounds, samples answers, computes their win rates by a judge, and fits the policy to them.

A round samples from its initial policy, which is also the reference. Departs: every round uses all prompts
(the paper gives each a third of them), and judges are rewards whose scores become win rates by `win_rates`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan, one_epoch
from luthier.registry import Range, nested, plan, spec


@plan(
    paper="arXiv:2405.00675",
    row="sppo",
    use_when="you have prompts and a judge, and want iterative preference optimization.",
    costs="`rounds` times sampling `n` answers, judging and a run.",
)
class SPPO(Plan):
    """`rounds` times rollout, score, win_rates and the objective `sppo`, each continuing from the last."""

    rounds: Annotated[int, Field(ge=1), Range(1, 5)] = 3  # number of self-play rounds
    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores answers
    beta: Annotated[float, Field(gt=0), Range(1e-4, 1.0, log=True)] = 1e-3  # 1 / eta of the paper
    n: Annotated[int, Field(ge=2)] = 5  # completions of each prompt; the best and the worst are trained on
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a completion
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature

    def recipes(self, recipe):
        sampling = {
            "name": "rollout",
            "n": self.n,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }
        judging = [{"name": "score", "reward": [spec(self.reward)]}, "win_rates", "pairs"]
        aim, roles, last = {"name": "sppo", "beta": self.beta}, {**recipe.roles, "reference": "initial"}, None
        for draw in range(self.rounds):
            stages = [*recipe.stages, {**sampling, "draw": draw}, *judging]
            report = yield recipe.but(
                stages=stages,
                objective=aim,
                roles=roles,
                init_from=last or recipe.init_from,
                **one_epoch(recipe),
            )
            last = report.folder
