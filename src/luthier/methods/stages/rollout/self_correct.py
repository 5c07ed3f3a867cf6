"""Two attempts at every prompt, for learning to correct oneself (SCoRe): behind a rollout of first attempts
it samples a second one after each, scores both, and gives each turn a row and an advantage.

The second attempt earns its reward and a bonus for what it changed, alpha * (second - first): a mistake
that is mended is worth much, a right answer that is spoilt costs much. The bonus is not the first
attempt's, which would then be paid for mistakes; it earns its own reward and, as often as `gamma` says,
that of the second. Phase 1 teaches the second attempt alone, with a strong KL that holds the first where it
was; phase 2 teaches both. Advantages are relative to the other attempts of the same prompt and turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import SAMPLES, Stage, pick, text_of
from luthier.methods.stages.rollout.advantages import TOKEN_ADVANTAGES, by_completion
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, nested, stage

ASK = (
    "There might be an error in the answer above because of lack of understanding of the question. Please"
    " correct the error, if any, and rewrite the answer."
)


@stage(
    paper="arXiv:2409.12917",
    row="score-self-correct",
    example={"max_new_tokens": 3, "reward": "length", "phase": 2, "kl_coef": 0.0},
    requires=[COMPLETIONS, GENERATE, LOGPROBS],
    provides=[COMPLETIONS, SAMPLES, SCORES, TOKEN_ADVANTAGES],
    removes=[PAIRS],
    use_when="a model is to mend its own answers in a second attempt: under `online_stages` behind"
    " `rollout`, with objective `reinforce_pp`, phase 1 and then phase 2.",
    costs="a second sample for every first one, and two rows to train for one.",
    covers="both phases, the bonus, the KL of each turn, advantages within a prompt and turn, the share"
    " of answers that are mended and spoilt.",
    omits="mixing in first attempts of the untuned model; the gain of both phases, which is not measured.",
    tests=[
        "methods/stages/rollout/test_self_correct.py::test_the_bonus_and_the_counts",
        "methods/stages/rollout/test_self_correct.py::test_the_gradient_is_that_of_both_rewards",
        "methods/stages/rollout/test_self_correct.py::test_two_rows_for_two_turns",
    ],
)
class SelfCorrect(Stage):
    """Rows of single attempts, first ones as they were, second ones with the first attempt in their prompt.
    Column `token_advantages`; `rewards` names both turns, what was mended (`mended`) and spoilt (`spoilt`).
    """

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores both attempts
    phase: Literal[1, 2] = 2  # 1: only the second attempt is rewarded; 2: both, with the bonus
    alpha: Annotated[float, Field(ge=0), Range(1.0, 20.0)] = 10.0  # weight of the bonus in phase 2
    # how much the second reward counts for the first attempt
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    # coefficient of the KL to the reference: of the first attempt in phase 1, of both in phase 2
    kl_coef: Annotated[float, Field(ge=0)] = 0.01
    ask: str = ASK  # what stands before the second attempt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of the second attempt
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @property
    def active_requires(self):
        return self.requires | {REFERENCE} if self.kl_coef else self.requires

    def __call__(self, rows, roles):
        rows, second = list(rows), []
        for place, row in enumerate(rows):
            for k, completion in enumerate(row["completions"]):
                prompt = self.prompt(row["prompt"], text_of(roles, completion))
                second.append({**pick(row, [k]), "id": f"{place}/{k}", "prompt": prompt})
        rollout = Rollout(n=1, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        answered = {row["id"]: row for row in rollout(second, roles)}
        out: list[dict] = []
        for place, row in enumerate(rows):
            pairs = []  # the attempts of which there are two: prompts that are too long have no second
            for k in range(len(row["completions"])):
                if f"{place}/{k}" in answered:
                    pairs.append((pick(row, [k]), answered[f"{place}/{k}"]))
            out += self.both_turns(row, pairs, roles)
        return self.priced(out, roles)

    def prompt(self, prompt: Any, attempt: str) -> Any:
        """The prompt of the second attempt."""
        if isinstance(prompt, str):
            return f"{prompt}{attempt}\n{self.ask}\n"
        return [*prompt, {"role": "assistant", "content": attempt}, {"role": "user", "content": self.ask}]

    def both_turns(self, row: dict, pairs: Sequence[tuple[dict, dict]], roles: Any) -> list[dict]:
        """The rows of a prompt's attempts, each with the advantage of its whole."""
        texts: list[list[str]] = [[], []]
        for turns in pairs:
            for turn, attempt in zip(texts, turns, strict=True):
                turn.append(text_of(roles, attempt["completions"][0]))
        if not pairs:
            return []
        first, second = (list(self.reward.scores(row, turn)) for turn in texts)
        returns = turn_returns(first, second, self.phase, self.alpha, self.gamma)
        out = []
        for k, turns in enumerate(pairs):
            rewards = {
                "first": [first[k]],
                "second": [second[k]],
                "mended": [float(second[k] > first[k])],
                "spoilt": [float(second[k] < first[k])],
            }
            for turn, attempt in enumerate(turns):
                columns = {
                    "id": f"{row['id']}/{k}/{turn}",
                    "scores": [(first, second)[turn][k]],
                    "advantage": against_others(returns[turn])[k],
                    "turn": turn,
                }
                out.append({**attempt, **columns, **({"rewards": rewards} if turn else {})})
        return out

    @torch.no_grad()
    def priced(self, rows: list[dict], roles: Any) -> list[dict]:
        """Advantages of tokens: that of the attempt less the price of the KL from here on."""
        out = []
        for i in range(0, len(rows), self.batch_size):
            batch = roles.batch(rows[i : i + self.batch_size])
            whole = torch.tensor([row["advantage"] for row in batch.rows], device=batch.ids.device)
            advantage = whole[batch.owner].float()
            if self.kl_coef:
                with roles.policy.eval_mode():
                    gap = roles.policy.logprobs(batch) - roles.reference.logprobs(batch)
                turns = torch.tensor([row["turn"] for row in batch.rows], device=batch.ids.device)
                priced = (turns == 0) | (self.phase == 2)
                advantage = advantage - self.kl_coef * batch.suffix(gap * priced[batch.owner])
            for row, column in zip(batch.rows, by_completion(batch, advantage), strict=True):
                bare = {key: value for key, value in row.items() if key not in ("advantage", "turn")}
                out.append({**bare, "token_advantages": column})
        return out


def turn_returns(
    first: Sequence[float], second: Sequence[float], phase: int, alpha: float, gamma: float
) -> tuple[list[float], list[float]]:
    """What the first and the second attempts have earned."""
    earned: tuple[list[float], list[float]] = ([], [])
    for one, two in zip(first, second, strict=True):
        if phase == 1:
            earned[0].append(gamma * two)
            earned[1].append(two)
        else:
            earned[0].append(one + gamma * two)
            earned[1].append(two + alpha * (two - one))
    return earned


def against_others(values: Sequence[float]) -> list[float]:
    """Each less the mean of the others; alone it stays as it is."""
    if len(values) == 1:
        return list(values)
    total = sum(values)
    return [value - (total - value) / (len(values) - 1) for value in values]
