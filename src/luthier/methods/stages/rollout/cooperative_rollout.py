"""Two agents answer one after the other, and each earns what both are worth: the pioneer answers the
prompt, the observer answers it with the pioneer's answer in view, and the reward of both is the sum.

One of the two is the policy, the other role `partner`. Plan `cory` has them train in turn and swap roles.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import OLD_LOGPROBS, SAMPLES, TRUNCATED, Stage, text_of
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.methods.stages.rollout.score import Score
from luthier.registry import Capability, nested_list, stage

PARTNER = Capability(
    "partner",
    says="the other one of two agents",
    advice="plan `cory` has one; else `roles: {partner: {name: model, model: FOLDER}}`",
    costs="a second model in memory, which writes an answer to each prompt.",
)
TEMPLATE = "{prompt}\n\nAn answer of somebody else:\n{answer}\n\nYour answer:"


@stage(
    example={"n": 2, "max_new_tokens": 3},
    paper="arXiv:2410.06101",
    row="cory",
    requires=[GENERATE, PARTNER],
    provides=[COMPLETIONS, SAMPLES, TRUNCATED, OLD_LOGPROBS, SCORES],
    removes=[PAIRS],
    contract={"gives": "it needs a partner"},
    use_when="two copies of a model train each other: under `online_stages`, as plan `cory` sets it.",
    costs="an answer of the policy and one of its partner for each sample.",
    covers="answers of the pioneer and of the observer who reads them, and the sum of their rewards.",
    tests=[
        "methods/plans/rounds/test_cory.py::test_both_earn_the_sum",
        "methods/plans/rounds/test_cory.py::test_without_the_partner_it_is_a_plain_rollout",
    ],
)
class CooperativeRollout(Stage):
    """Columns of stages `rollout` and `score`; `partner_answers`, the texts of the other one."""

    turn: Literal["pioneer", "observer"] = "pioneer"  # which of the two the policy is
    reward: Annotated[tuple, nested_list("reward")] = ("exact_match",)  # of the task, for either answer
    n: Annotated[int, Field(ge=1)] = 4  # samples of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of an answer
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    share: Annotated[float, Field(ge=0)] = 1.0  # weight of the partner's reward; 0: everyone for himself
    template: str = TEMPLATE  # what the observer reads
    draw: int = 0  # number of the draw; another number gives other samples

    def __post_init__(self):
        if "{prompt}" not in self.template or "{answer}" not in self.template:
            raise ValueError("template: it must say where {prompt} and {answer} stand")

    def __call__(self, rows, roles):
        how = {"n": self.n, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        rollout = Rollout(old=True, draw=self.draw, **how)
        if self.turn == "pioneer":
            own = list(rollout(rows, roles))
            pairs = [(row, text_of(roles, answer)) for row in own for answer in row["completions"]]
            prompts = [showing(row["prompt"], self.template, answer) for row, answer in pairs]
            answers = self.answered(roles, [row for row, _ in pairs], prompts)
            others = [answers[first : first + self.n] for first in range(0, len(answers), self.n)]
            tasks = own
        else:
            rows = list(rows)
            answers = self.answered(roles, rows, [row["prompt"] for row in rows])
            observed = []
            for row, answer in zip(rows, answers, strict=True):
                prompt = showing(row["prompt"], self.template, answer)
                observed.append({**row, "prompt": prompt, "task_prompt": row["prompt"], "partner": answer})
            own = list(rollout(observed, roles))
            others = [[row["partner"]] * self.n for row in own]
            tasks = [{**row, "prompt": row["task_prompt"]} for row in own]
        return self.paid(roles, own, tasks, others)

    def paid(self, roles: Any, own: list[dict], tasks: list[dict], others: list[list[str]]) -> list[dict]:
        """The policy's rows with the sum of both rewards. tasks: the same rows with the task's prompt."""
        score = Score(reward=self.reward)
        mine = [row["scores"] for row in score(tasks, roles)]
        partners = [{**row, "completions": texts} for row, texts in zip(tasks, others, strict=True)]
        theirs = [row["scores"] for row in score(partners, roles)]
        out = []
        for row, a, b, texts in zip(own, mine, theirs, others, strict=True):
            scores = [first + self.share * second for first, second in zip(a, b, strict=True)]
            rest = {name: value for name, value in row.items() if name not in ("task_prompt", "partner")}
            out.append({**rest, "scores": scores, "partner_answers": texts})
        return out

    def answered(self, roles: Any, rows: list[dict], prompts: list[Any]) -> list[str]:
        """What the partner writes to each prompt."""
        if not rows:
            return []
        ids = [
            roles.renderer.prompt({**row, "prompt": prompt})
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        seeds = []
        for place, row in enumerate(rows):
            seeds.append(roles.clock.derive_seed("partner", self.draw, row["id"], place))
        how = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        written = roles.partner.generate(ids, seeds=seeds, n=1, stop=list(roles.renderer.stop_ids), **how)
        return [roles.renderer.answer(samples[0]) for samples in written]


def showing(prompt: Any, template: str, answer: str) -> Any:
    """A prompt with somebody else's answer, of a conversation in its last turn."""
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt).replace("{answer}", answer.strip())
    last = prompt[-1]
    words = template.replace("{prompt}", str(last.get("content") or "")).replace("{answer}", answer.strip())
    return [*prompt[:-1], {**last, "content": words}]
