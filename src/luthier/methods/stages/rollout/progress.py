"""Dense rewards for long reasoning (MRT): each episode of a completion is paid for its progress, by how much
it raises the chance of a right answer if the policy had to answer now.

A completion is cut into episodes, at paragraphs or at words such as "Wait". After each of them the policy is
made to stop thinking (`stop`) and answers `n` times; the mean reward J is what the episodes so far are worth,
and what an episode adds to it is its progress. Progress adds up to J of the whole less J of nothing.

An episode's tokens have the outcome's advantage and `alpha` times their own progress, both relative to the
other completions of the row; the last part of a completion is its answer, which has the outcome's alone. So
an episode that adds nothing is worth less than to stop. Departs: every prefix of every sample is valued,
where the paper values one prefix, drawn from an earlier policy, and branches there; progress is centred over
all episodes of the row in place of the branches of one prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import SAMPLES, Stage, text_of, without
from luthier.methods.stages.rollout.advantages import TOKEN_ADVANTAGES
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, nested, stage
from luthier.text.tokens import tokenize


@stage(
    paper="arXiv:2503.07572",
    row="mrt",
    example={"n": 2, "max_new_tokens": 3, "reward": "length", "pattern": "[aeiou]"},
    requires=[COMPLETIONS, SAMPLES, SCORES, GENERATE],
    provides=[TOKEN_ADVANTAGES],
    removes=[PAIRS],
    use_when="answers come after long reasoning of which much is useless: under `online_stages` behind"
    " `rollout` and `score`, with objective `reinforce_pp`.",
    costs="`n` short samples after each episode of each completion; `most_episodes` bounds them.",
    covers="episodes, their values by forced answers, progress, and the regret over episodes in the log;"
    " with alpha 0 the advantages are GRPO's.",
    omits="branching from prefixes of an earlier policy, the form by filtered fine-tuning (STaR).",
    tests=[
        "methods/stages/rollout/test_progress.py::test_progress_adds_up",
        "methods/stages/rollout/test_progress.py::test_without_alpha_it_is_grpo",
        "methods/stages/rollout/test_progress.py::test_regret_is_the_area",
        "methods/stages/rollout/test_progress.py::test_useless_episodes_are_unlearned",
    ],
)
class Progress(Stage):
    """Column `token_advantages`; `rewards` names the outcome, the whole progress and the regret."""

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores forced answers
    alpha: Annotated[float, Field(ge=0), Range(0.1, 2.0)] = 0.2  # weight of progress beside the outcome
    pattern: str = r"\n\n|(?=\bWait\b)|(?=\bAlternatively\b)"  # where an episode ends
    stop: str = "\nThe answer is"  # what ends the thinking, before a forced answer
    n: Annotated[int, Field(ge=1), Range(2, 16, log=True)] = 4  # forced answers after each episode
    max_new_tokens: Annotated[int, Field(ge=1)] = 32  # maximum tokens of a forced answer
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature of forced answers
    most_episodes: Annotated[int, Field(ge=1)] = 8  # a completion's last episode holds whatever is behind
    scale: bool = True  # divide the outcome's advantage by its deviation within the row

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: {error}") from None

    def __call__(self, rows, roles):
        rows = [row for row in rows if row["completions"]]
        cut = [[self.episodes(roles, c) for c in row["completions"]] for row in rows]
        values = self.values(rows, cut, roles)
        out = []
        for row, episodes, each in zip(rows, cut, values, strict=True):
            gains = [progress(v) for v in each]
            advantages = episode_advantages(row["scores"], gains, self.alpha, self.scale)
            rewards = {
                "outcome": list(row["scores"]),
                "progress": [sum(g) for g in gains],
                "regret": [regret(v[1:]) for v in each],
            }
            columns = []
            for parts, whole in zip(episodes, advantages, strict=True):
                tokens: list[float] = []
                for ids, advantage in zip(parts, whole, strict=True):
                    tokens += [advantage] * len(ids)
                columns.append(tokens)
            out.append({**row, "token_advantages": columns, "rewards": rewards})
        return out

    def episodes(self, roles: Any, completion: Any) -> list[list[int]]:
        """The token ids of a completion, episode by episode; an episode ends with the token that ends it."""
        if isinstance(completion, str):
            completion = tokenize(roles.renderer.tokenizer, completion)
        text = text_of(roles, completion)
        ends = sorted({m.end() for m in re.finditer(self.pattern, text) if 0 < m.end() < len(text)})
        ends = ends[: self.most_episodes - 1]
        parts: list[list[int]] = [[]]
        for place, token in enumerate(completion):
            parts[-1].append(token)
            while ends and len(text_of(roles, completion[: place + 1])) >= ends[0]:
                ends.pop(0)
                if place + 1 < len(completion) and parts[-1]:
                    parts.append([])
        return parts

    def values(self, rows: Sequence[dict], cut: Sequence, roles: Any) -> list[list[list[float]]]:
        """Of each completion, what it is worth before its first episode and after each one."""
        prefixes: list[dict] = []
        for place, (row, completions) in enumerate(zip(rows, cut, strict=True)):
            prefixes.append({**without(row), "id": f"{place}/", "prompt": self.forced(row["prompt"], "")})
            for k, parts in enumerate(completions):
                ids: list[int] = []
                for j, part in enumerate(parts):
                    ids = ids + part
                    forced = self.forced(row["prompt"], text_of(roles, ids))
                    prefixes.append({**without(row), "id": f"{place}/{k}/{j}", "prompt": forced})
        rollout = Rollout(n=self.n, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        worth: dict[str, float] = {}
        for row in rollout(prefixes, roles):
            scores = self.reward.scores(row, [text_of(roles, c) for c in row["completions"]])
            worth[row["id"]] = sum(scores) / len(scores)
        out = []
        for place, completions in enumerate(cut):
            each = []
            for k, parts in enumerate(completions):
                values = [worth.get(f"{place}/", 0.0)]
                for j in range(len(parts)):
                    # a prefix that leaves no room for an answer is worth what it was worth before
                    values.append(worth.get(f"{place}/{k}/{j}", values[-1]))
                each.append(values)
            out.append(each)
        return out

    def forced(self, prompt: Any, thought: str) -> Any:
        """The prompt of a forced answer: the thinking so far, and its end."""
        if isinstance(prompt, str):
            return f"{prompt}{thought}{self.stop}"
        return [*prompt, {"role": "assistant", "content": thought + self.stop}]


def progress(values: Sequence[float]) -> list[float]:
    """What each episode adds. values: before the first episode, and after each one."""
    return [after - before for before, after in zip(values, values[1:], strict=False)]


def regret(values: Sequence[float], oracle: float = 1.0) -> float:
    """What is lost to an oracle over all budgets: the sum of oracle - J after each episode."""
    return sum(oracle - value for value in values)


def episode_advantages(
    scores: Sequence[float], gains: Sequence[Sequence[float]], alpha: float, scale: bool
) -> list[list[float]]:
    """Of each completion of a row and each of its parts: GRPO's advantage of the outcome, and of all but the
    last one, the answer, alpha times its progress less that of an average episode of the row.
    """
    count, mean = len(scores), sum(scores) / len(scores)
    spread = 1.0
    if scale:
        variance = sum((score - mean) ** 2 for score in scores) / max(count - 1, 1)
        spread = variance**0.5 + 1e-4
    flat: list[float] = []
    for gain in gains:
        flat += gain[:-1]
    average = sum(flat) / max(len(flat), 1)
    out = []
    for score, gain in zip(scores, gains, strict=True):
        outcome = (score - mean) / spread
        out.append([outcome + alpha * (each - average) for each in gain[:-1]] + [outcome])
    return out
