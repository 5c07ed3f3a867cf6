"""RAFT: samples, keeps the best and trains on it, in rounds. Sampling and training are separate, so one model
is in memory at a time.

Departs: the best completion of each prompt is kept (the paper's other ranking, over all prompts together, is
left out). A round is evaluated by the reward of greedy answers to held-out prompts, since the reward of the
kept answers is near its maximum by selection alone; the model before the first round is measured alike.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan, better, holds, one_epoch
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.registry import Range, build, nested, plan, provides_of, spec

METRIC = "generated_reward"


@plan(
    paper="arXiv:2304.06767",
    row="raft",
    use_when="answers can be scored and you want reinforcement learning's gain by plain supervised steps.",
    costs="at most `rounds` times sampling, scoring and a run.",
    covers="rounds of sampling, ranking and supervised steps, with a price on leaving the untuned model.",
    omits="the ranking over all prompts together; diversity is an evaluator of its own.",
    tests=[
        "methods/plans/rounds/test_raft.py::test_five_rounds_rise_and_beat_one_of_as_many_samples",
        "methods/plans/rounds/test_raft.py::test_raft_of_one_sample_is_sft_on_own_samples",
        "methods/plans/rounds/test_raft.py::test_raft_returns_a_model_that_is_not_worse",
    ],
)
class RAFT(Plan):
    """`rounds` times rollout, score, best, and then the recipe's objective (sft), each continuing from the
    last.

    Stops when the reward no longer rises, and returns the best round, or the model as it was where the
    first round makes it worse. Without held-out rows to measure it, all rounds are run and the last one is
    returned.
    """

    rounds: Annotated[int, Field(ge=1), Range(2, 10)] = 5  # maximum number of rounds
    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores answers
    n: Annotated[int, Field(ge=1), Range(4, 32, log=True)] = 8  # completions of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a completion
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature; the paper uses 0.85 to 1
    least: float | None = None  # rows whose best answer scores lower are left out of the round
    # coefficient of the KL to the untuned model, subtracted from the reward
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    judged: Annotated[int, Field(ge=1)] = 256  # held-out prompts on which a round is evaluated

    def recipes(self, recipe):
        sampling = {
            "name": "rollout",
            "n": self.n,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }
        score, best = {"name": "score", "reward": [spec(self.reward)]}, {"name": "best", "least": self.least}
        penalty = [{"name": "kl_penalty", "kl_coef": self.kl_coef}] if self.kl_coef else []
        measure = {
            "name": "generate",
            "reward": spec(self.reward),
            "n": self.judged,
            "max_new_tokens": self.max_new_tokens,
        }
        evaluate = [e for e in recipe.evaluate or () if _name(e) != "generate"]
        roles = self.roles(recipe)
        champion = None
        for draw in range(self.rounds):
            stages = [*recipe.stages, {**sampling, "draw": draw}, score, *penalty, best]
            start = recipe.init_from if champion is None else champion.folder
            report = yield recipe.but(
                stages=stages,
                objective=recipe.objective or "sft",
                init_from=start,
                roles=roles,
                evaluate=[*evaluate, measure],
                **one_epoch(recipe),
            )
            if champion is None and not holds(report, METRIC):
                # the untuned model stands: a run without training holds it, and its metrics
                return (
                    yield recipe.but(
                        objective=None, stages=[], online_stages=[], evaluate=[*evaluate, measure]
                    )
                )
            if not better(report, champion, METRIC):
                break
            champion = report
        return champion

    def roles(self, recipe: Any) -> dict[str, Any]:
        """The recipe's roles. The penalty is for leaving the untuned model: where the tuner cannot be
        disabled, the reference by default would be what each round starts from, and it is loaded instead.
        """
        tuner = build("tuner", recipe.tuner)
        if not self.kl_coef or "reference" in recipe.roles or DISABLE_ADAPTER in provides_of(tuner):
            return recipe.roles
        return {**recipe.roles, "reference": {"name": "model", "model": recipe.model}}


def _name(method: Any) -> Any:
    return method.get("name") if isinstance(method, dict) else method
