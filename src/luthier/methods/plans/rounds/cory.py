"""CORY: two copies of a model train each other. One answers as the pioneer, the other as the observer who
reads that answer; both earn the sum of their rewards, and from time to time they swap roles.

A round trains both agents for `swap_every` steps, each against the other as it was when the round began;
then they swap. Either can be used alone afterwards: the result is the pioneer of the last round, which
answers plain prompts. Departs: within a round the partner's weights stand still (the authors update both at
every step), and each agent's policy gradient is that of the recipe, REINFORCE++ with groups by default,
where theirs is PPO with a value head, which here would begin anew in every round."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.methods.plans.rounds._rounds import reference_at
from luthier.registry import Range, nested, plan, spec


@plan(
    paper="arXiv:2410.06101",
    row="cory",
    use_when="reinforcement learning with one copy leaves the model it began with, or collapses, before its"
    " reward is high, and memory holds a second copy.",
    costs="two runs of `swap_every` steps a round, each with the other agent in memory, which writes as"
    " well.",
    covers="pioneer and observer with weights of their own, the sum of rewards, a KL penalty to the model"
    " that the plan starts from, exchange of roles, streams of random numbers of their own.",
    omits="partners that move within a round, value heads over rounds, and the fronts of reward and KL"
    " against PPO alone, which are not measured.",
    tests=[
        "methods/plans/rounds/test_cory.py::test_agents_swap_roles",
        "methods/plans/rounds/test_cory.py::test_both_earn_the_sum",
        "methods/plans/rounds/test_cory.py::test_without_the_partner_it_is_a_plain_rollout",
    ],
)
class Cory(Plan):
    """`rounds` times a run of either agent, who then swap roles; the last pioneer is the result."""

    rounds: Annotated[int, Field(ge=1), Range(2, 16)] = 4  # how often both are trained
    swap_every: Annotated[int, Field(ge=1), Range(2, 50)] = 5  # steps of a round
    reward: Annotated[Any, nested("reward")] = "exact_match"  # of the task, for either answer
    n: Annotated[int, Field(ge=1), Range(2, 16)] = 4  # samples of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of an answer
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    kl_coef: Annotated[float, Field(ge=0), Range(1e-3, 0.5, log=True)] = 0.05  # of the KL to the start

    def recipes(self, recipe):
        agents: list[str | None] = [None, None]
        reports: list[Any] = []
        for number in range(self.rounds):
            requests = []
            for agent in (0, 1):
                pioneer = (agent + number) % 2 == 0
                requests.append(self.run(recipe, agents, agent, number, pioneer))
            reports = yield requests
            agents = [str(report.folder) for report in reports]
        return reports[(self.rounds - 1) % 2]

    def run(self, recipe: Any, agents: list[str | None], agent: int, number: int, pioneer: bool) -> Any:
        """One agent's run of a round."""
        together = {
            "name": "cooperative_rollout",
            "turn": "pioneer" if pioneer else "observer",
            "reward": [spec(self.reward)],
            "n": self.n,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "draw": 2 * number + agent,
        }
        advantages = {
            "name": "advantages",
            "baseline": "group" if self.n > 1 else "none",
            "kl_coef": self.kl_coef,
        }
        roles = reference_at("start", recipe) if self.kl_coef else dict(recipe.roles)
        partner = agents[1 - agent] or recipe.init_from or recipe.model
        changes: dict[str, Any] = {
            "objective": recipe.objective or "reinforce_pp",
            "online_stages": [together, advantages],
            "roles": {**roles, "partner": {"name": "model", "model": partner}},
            "max_steps": self.swap_every,
        }
        if agents[agent] is not None:
            changes["init_from"] = agents[agent]
        return recipe.but(**changes)
