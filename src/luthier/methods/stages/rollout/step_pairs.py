"""Pairs from the step at which a wrong solution goes wrong: before it the policy could still reach the
answer, after it less often.

The value of each prefix of a wrong solution is how often the policy reaches the right answer from there; the
step of lowest advantage is selected. The rejected completion is the solution from this step on, the chosen
one a right continuation from just before it. Every wrong completion of a row makes a pair of its own. Trained
on with `dpo`, this weights steps by their advantage, which right solutions alone cannot do.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, SAMPLES, Stage, text_of, without
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, nested, stage


@stage(
    example={"n": 2, "max_new_tokens": 3},
    paper="arXiv:2406.14532",
    row="per-step-dpo-negatives",
    requires=[COMPLETIONS, GENERATE],
    provides=[PAIRS, SCORES],
    removes=[OLD_LOGPROBS, CACHED_LOGPROBS, SAMPLES],
    contract={
        "gives": "a model that never reaches the right answer finds no right continuation, so all rows are"
        " dropped"
    },
    use_when="the policy often solves a problem wrongly from some step on and answers can be checked:"
    " it finds that step and makes a pair there.",
    costs="`n` samples from each prefix of each wrong solution: the most costly stage.",
    covers="pairs at the step of lowest Monte-Carlo advantage, for every wrong completion of a row; trained"
    " on with `dpo`.",
    omits="rejection fine-tuning and outcome-level pairs are `best` and `pairs`; the comparison of how many"
    " rows each needs is not repeated here.",
    tests=[
        "methods/stages/rollout/test_step_pairs.py::test_every_wrong_completion_makes_a_pair",
        "methods/objectives/reward/test_process_reward.py"
        "::test_advantages_by_sampling_and_the_policy_that_weighs_by_them",
        "methods/objectives/reward/test_process_reward.py::test_pairs_come_from_where_it_goes_wrong",
    ],
)
class StepPairs(Stage):
    """Columns `prefix` (shared, not trained on), `completions` [chosen, rejected], `advantages` of the wrong
    solution's steps. Rows without a wrong completion, or without a right continuation, are dropped. Rewards
    count as right from 0.5 on.
    """

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores answers
    n: Annotated[int, Field(ge=1), Range(4, 128, log=True)] = 8  # continuations sampled from each prefix
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a continuation
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    separator: str = "\n"  # text that ends a step
    # wrong completions of a row that are used; all if not given
    most: Annotated[int, Field(ge=1)] | None = None
    draw: int = 0  # number of the draw; another number gives other samples

    def __call__(self, rows, roles):
        rows, requests, plans, right = list(rows), [], [], 0
        for row in rows:
            begun, several = row.get("prefix", ""), self.wrong(row, roles)
            right += not several
            for k, wrong in enumerate(several):
                # the first keeps the row's id, so that its samples do not depend on further ones
                one = row if k == 0 else {**row, "id": f"{row['id']}/wrong-{k}"}
                steps = split(wrong, self.separator)
                plans.append((one, steps, len(steps)))
                for i in range(len(steps)):
                    prefix = begun + "".join(steps[:i])
                    requests.append({**one, "id": f"{one['id']}/{i}", "prefix": prefix})
        rollout = Rollout(
            n=self.n, max_new_tokens=self.max_new_tokens, temperature=self.temperature, draw=self.draw
        )
        answered = {r["id"]: [text_of(roles, c) for c in r["completions"]] for r in rollout(requests, roles)}
        out = [pair for plan in plans if (pair := self.pair(answered, *plan)) is not None]
        total = right + len(plans)
        self.left(
            roles,
            total - len(out),
            total,
            "they have no wrong step, or no right continuation was sampled before it",
        )
        return out

    def wrong(self, row: dict, roles: Any) -> list[str]:
        """The wrong completions of a row, each once; at most `most` of them."""
        texts = [text_of(roles, c) for c in row["completions"]]
        scores = self.reward.scores(row, texts)
        wrong = [text for text, score in zip(texts, scores, strict=True) if score < 0.5]
        return list(dict.fromkeys(wrong))[: self.most]

    def pair(self, answered: dict[str, list[str]], row: dict, steps: list[str], n: int) -> dict | None:
        """A row's pair from its pit; None where no beginning before it ends right."""
        values, right = [], []
        for i in range(n):
            start = "".join(steps[:i])
            texts = answered.get(f"{row['id']}/{i}", [])
            good = [s >= 0.5 for s in self.reward.scores(row, [start + t for t in texts])]
            values.append(sum(good) / max(len(good), 1))
            right.append(next((t for t, g in zip(texts, good, strict=True) if g), None))
        gains = advantages([*values, 0.0])
        pit = gains.index(min(gains))
        if right[pit] is None:
            return None
        shared = row.get("prefix", "") + "".join(steps[:pit])
        rest = without(row, "rewards")
        return {
            **rest,
            "prefix": shared,
            "completions": [right[pit], "".join(steps[pit:])],
            "scores": [1.0, 0.0],
            "advantages": gains,
        }


def split(text: str, separator: str) -> list[str]:
    """Steps of a text, each with what ends it."""
    parts = text.split(separator)
    return [p + separator for p in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def advantages(values: list[float]) -> list[float]:
    """Value of each beginning, and of the whole -> what each step changed."""
    return [after - before for before, after in zip(values, values[1:], strict=False)]
