"""Several goals at once: the mean reward of each goal on answers sampled for held-out prompts.

Answers are sampled, not greedy, since a trade-off between goals shows in the whole distribution. The samples
depend on the seed and the row, so models that are measured on the same rows are comparable.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.registry import Metric, build, evaluator, requires_of


@evaluator(
    metrics=[
        Metric("goal", "mean reward", better="higher", rank=6),
    ],
    requires=[GENERATE],
    use_when="several goals are traded against each other and each is to be measured on the same answers.",
    costs="`samples` answers to each of `n` prompts, and one call of each reward.",
)
class Goals(Evaluator):
    """`goal/NAME` of each goal, and per example. Every goal scores the same answers."""

    # name: a reward, e.g. {short: {name: length, scale: -1.0}}
    goals: Annotated[dict[str, Any], Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] = 64  # prompts that are answered
    samples: Annotated[int, Field(ge=1)] = 1  # answers per prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of an answer
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature; 0 is greedy

    def __post_init__(self):
        for name, reward in self.goals.items():
            build("reward", reward)
            if "/" in name:
                raise ValueError(f"goals: '{name}' must not contain a slash")

    @property
    def active_requires(self):
        return self.requires.union(*(requires_of(build("reward", r)) for r in self.goals.values()))

    def run(self, roles, rows, folder, when):
        rows = [r for r in rows if r["prompt"] not in ("", [])][: self.n]
        if not rows:
            return {}
        seeds = [roles.clock.derive_seed("goals", r["id"], at=0) for r in rows]
        how = {"n": self.samples, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        written = roles.policy.generate(
            [roles.renderer.prompt(r) for r in rows], seeds=seeds, stop=roles.renderer.stop_ids, **how
        )
        by_goal = {}
        for name, reward in self.goals.items():
            judge = build("reward", reward)
            scores = [
                judge.scores(row, [roles.renderer.answer(ids) for ids in answers])
                for row, answers in zip(rows, written, strict=True)
            ]
            by_goal[f"goal/{name}"] = {
                str(row["id"]): sum(each) / len(each) for row, each in zip(rows, scores, strict=True)
            }
        keep(folder, when, **by_goal)
        return {name: sum(each.values()) / len(each) for name, each in by_goal.items()}
