"""A bandit on which preference objectives can be observed in seconds, with everything about them known
exactly.

One question, many answers (arms) in a line, each with a true reward; a policy that generalises to
neighbouring arms. What is varied is what the comparison of arXiv:2404.14367 varies: the objective, how often
fresh samples are drawn, and how often each draw is used. The objectives are the library's own, on the
library's own batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.clock import Clock
from luthier.model.batch import collate
from luthier.model.policy import Roles
from luthier.text.encode import Encoded


class Arms(nn.Module):
    """A policy over arms: logits = base + kernel @ weights, where a kernel wider than an arm makes neighbours
    alike.
    """

    def __init__(self, base: Tensor, width: float = 0.0):
        """base: [arms] logits of the reference. width: of the kernel, in arms; 0 tells every arm apart."""
        super().__init__()
        place = torch.arange(len(base), dtype=base.dtype)
        near = (
            (-0.5 * ((place[:, None] - place) / width).square()).exp()
            if width
            else torch.eye(len(base), dtype=base.dtype)
        )
        self.base, self.kernel = base, near
        self.weights = nn.Parameter(torch.zeros_like(base))

    def log_policy(self) -> Tensor:
        """[arms] log-probabilities."""
        return (self.base + self.kernel @ self.weights).log_softmax(-1)

    def logprobs(self, batch: Any) -> Tensor:
        """[T] what an objective asks: the log-probability of each arm that was pulled."""
        return self.log_policy()[batch.labels[batch.targets]]


class Fixed:
    """The reference: the policy as it began."""

    def __init__(self, logits: Tensor):
        self.log_probs = logits.log_softmax(-1)

    def logprobs(self, batch: Any) -> Tensor:
        return self.log_probs[batch.labels[batch.targets]]


def roles_of(policy: Arms, reference: Tensor | None = None) -> Roles:
    """The two that preference objectives ask. reference: [arms] logits, by default the policy's base."""
    roles = Roles.__new__(Roles)
    roles.__dict__ |= {
        "policy": policy,
        "clock": Clock(),
        "reference": Fixed(policy.base if reference is None else reference),
    }
    return roles


def pulled(arms: Sequence[Sequence[int]], reward: Tensor, **columns: Any) -> list[dict]:
    """Rows of arms that were pulled together, scored by their reward."""
    return [
        {
            "id": str(i),
            "prompt": [0],
            "completions": [[a] for a in row],
            "scores": [float(reward[a]) for a in row],
            **columns,
        }
        for i, row in enumerate(arms)
    ]


def batch_of(rows: Sequence[dict]):
    return collate(
        rows, lambda row: Encoded(row["prompt"], row["completions"], [[True] for _ in row["completions"]])
    )


def average(objective: Any, roles: Any, rows: Sequence[dict]) -> Tensor:
    """What the training loop makes of an objective on these rows."""
    batch = batch_of(rows)
    return sum(
        (w * o.loss(roles, batch).sum() / (o.divisor(batch) or 1) for w, o in objective.terms()),
        torch.zeros(()),
    )


@dataclass
class Course:
    """What was seen along a run, a number for each step."""

    reward: list[float] = field(default_factory=list)  # expected under the policy
    kl: list[float] = field(default_factory=list)  # to the reference
    # mean log-probability of the best of the rows learned from
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)  # of the worst
    best_arm: list[float] = field(default_factory=list)  # log-probability of the arm of highest reward
    moved: list[float] = field(default_factory=list)  # probability mass that a step relocates


def study(
    objective: Any,
    reward: Tensor,
    base: Tensor,
    *,
    steps: int = 200,
    rows: int = 32,
    n: int = 2,
    fresh_every: int | None = None,
    width: float = 3.0,
    learning_rate: float = 0.1,
    seed: int = 0,
    after: Callable[[Arms], None] | None = None,
) -> Course:
    """Train a policy on its draws. fresh_every: steps between draws from the policy as it is (1 is
    on-policy); None draws once, from the reference. n: arms pulled together. Gradient by Adam."""
    policy, course = Arms(base, width), Course()
    roles, rng = roles_of(policy), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    reference, was, data = base.softmax(-1), base.softmax(-1), []
    for step in range(steps):
        if step == 0 or (fresh_every and step % fresh_every == 0):
            drawn = torch.multinomial(policy.log_policy().detach().exp(), rows * n, True, generator=rng).view(
                rows, n
            )
            data = pulled([r.tolist() for r in drawn], reward)
        adam.zero_grad()
        loss = average(objective, roles, data)
        if loss.requires_grad:
            loss.backward()
            adam.step()
        logp = policy.log_policy().detach()
        best, worst = (
            [row["completions"][row["scores"].index(f(row["scores"]))][0] for row in data] for f in (max, min)
        )
        course.reward.append(float(logp.exp() @ reward))
        course.kl.append(float((logp.exp() * (logp - reference.log())).sum()))
        course.chosen.append(float(logp[best].mean()))
        course.rejected.append(float(logp[worst].mean()))
        course.best_arm.append(float(logp[int(reward.argmax())]))
        course.moved.append(float((logp.exp() - was).abs().sum() / 2))
        was = logp.exp()
        if after:
            after(policy)
    return course
