"""Advantages of single tokens, over all rows of a step: rewards to go less a baseline, the KL to the
reference as part of each token's reward, normalised over the whole global batch.

With `baseline: none` they are those of REINFORCE++, with `group` those of REINFORCE++-baseline, with
`critic` PPO's generalised advantage estimates. They are computed once for a draw, before it is cut into
micro-batches and used for `num_iterations` steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.roles._base import CRITIC, REFERENCE
from luthier.methods.stages._base import OLD_LOGPROBS, Stage
from luthier.model.batch import Batch
from luthier.processes import group
from luthier.registry import Column, Range, stage

TOKEN_ADVANTAGES = Column(
    "token_advantages",
    per="token",
    says="an advantage of each token (stage advantages)",
    advice="e.g. `online_stages: [{name: rollout, old: true}, {name: score}, {name: advantages}]`",
    example=(0.5, -1.0, 0.25),
)
RETURNS = Column("returns", per="token", says="the reward to go of each token", example=(0.5, 1.0, -0.5))
OLD_VALUES = Column(
    "old_values", per="token", says="what the critic expected before each token", example=(0.2, 0.4, 0.1)
)


@stage(
    paper="arXiv:1506.02438",
    requires=[COMPLETIONS, SCORES, LOGPROBS],
    provides=[TOKEN_ADVANTAGES, RETURNS, OLD_VALUES],
    use_when="objectives `ppo` and `reinforce_pp` need advantages of tokens.",
    costs="a forward pass of the critic and of the reference, where they are used.",
)
class Advantages(Stage):
    """Column `token_advantages`; with a critic also `returns` and `old_values`. A completion ends in a
    state of value 0, also where it was cut.
    """

    # what rewards are compared with: nothing, the mean score of the row, or what the critic expects
    baseline: Literal["none", "group", "critic"] = "none"
    kl_coef: Annotated[float, Field(ge=0), Range(1e-3, 0.1, log=True)] = 0.0  # of the KL to the reference
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0  # how much a reward counts one token earlier
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95  # lambda of GAE, with a critic: 1 trusts rewards alone
    whiten: bool = True  # normalise advantages to mean 0 and deviation 1 over all tokens of the step
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @property
    def active_requires(self):
        required = set(self.requires)
        if self.baseline == "critic":
            required.add(CRITIC)
        if self.kl_coef:
            required |= {REFERENCE, OLD_LOGPROBS}
        return frozenset(required)

    @property
    def active_provides(self):
        return self.provides if self.baseline == "critic" else frozenset({TOKEN_ADVANTAGES})

    @torch.no_grad()
    def __call__(self, rows, roles):
        rows, batches = [row for row in rows if row["completions"]], []
        for i in range(0, len(rows), self.batch_size):
            batches.append(roles.batch(rows[i : i + self.batch_size]))
        every = [self.estimate(roles, batch) for batch in batches]
        if self.whiten:
            mean, deviation = moments([advantage for advantage, _ in every])
            every = [((a - mean) / (deviation + 1e-8), values) for a, values in every]
        out = []
        for batch, (advantage, values) in zip(batches, every, strict=True):
            columns = {"token_advantages": by_completion(batch, advantage)}
            if values is not None:
                columns |= {name: by_completion(batch, v) for name, v in values.items()}
            for place, row in enumerate(batch.rows):
                out.append({**row, **{name: column[place] for name, column in columns.items()}})
        return out

    def estimate(self, roles, batch: Batch) -> tuple[Tensor, dict[str, Tensor] | None]:
        """[T] advantages before they are normalised; with a critic also its values and the returns."""
        rewards = self.rewards(roles, batch)
        if self.baseline != "critic":
            return batch.suffix(rewards, self.gamma), None
        with roles.policy.eval_mode():
            values = roles.critic.values(roles.policy, batch)
        advantage = gae(batch, rewards, values, self.gamma, self.lam)
        return advantage, {"returns": advantage + values, "old_values": values}

    def rewards(self, roles, batch: Batch) -> Tensor:
        """[T] minus the price of each token's KL, and the completion's score at its last token."""
        scores = batch.column("scores")
        if self.baseline == "group":
            scores = scores - batch.over_group(scores)
        left = batch.lengths[batch.owner] - batch.place
        rewards = torch.where(left == 1, scores[batch.owner], 0.0)
        if self.kl_coef:
            gap = batch.per_token("old_logprobs") - roles.reference.logprobs(batch)
            rewards = rewards - self.kl_coef * gap
        return rewards


def gae(batch: Batch, rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """[T] generalised advantage estimates: the sum over later tokens of (gamma lam)^k times r + gamma V' -
    V.
    """
    after = torch.cat([values[1:], values.new_zeros(1)])
    last = batch.place + 1 == batch.lengths[batch.owner]
    surprise = rewards + gamma * torch.where(last, 0.0, after) - values
    return batch.suffix(surprise, gamma * lam)


def moments(parts: list[Tensor]) -> tuple[float, float]:
    """Mean and deviation of all numbers of all processes."""
    flat = torch.cat([torch.zeros(0), *(part.cpu() for part in parts)]).double()
    sums = torch.stack([torch.tensor(float(len(flat))).double(), flat.sum(), flat.square().sum()])
    count, total, squares = group.current().sum(sums).tolist()
    mean = total / max(count, 1.0)
    return mean, max(squares / max(count, 1.0) - mean**2, 0.0) ** 0.5


def by_completion(batch: Batch, values: Tensor) -> list[list[list[float]]]:
    """[T] -> of each row and each of its completions, the numbers of its supervised tokens."""
    parts: Iterator[Tensor] = iter(values.float().cpu().split(batch.lengths.long().tolist()))
    return [[next(parts).tolist() for _ in row["completions"]] for row in batch.rows]
