"""What the samples of a step were worth: rewards, their spread, groups in which all are alike, lengths.

Objectives that compare the samples of a prompt with each other learn nothing from a group of equal rewards,
and their loss, which is about 0 in any case, does not show it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

EQUAL = "equal_rewards"  # the share of groups, of two samples or more, whose rewards are all the same
EXPLAINED = "explained_variance"  # the share of the variance of returns that the critic had foreseen
# means of returns and of the critic's errors, and of their squares
RETURN, ERROR, RETURN_SQUARE, ERROR_SQUARE = "\0return", "\0error", "\0return_square", "\0error_square"


Sums = dict[str, tuple[float, float]]  # name -> sum of its values, and how many they are


def sample_sums(rows: Sequence[dict]) -> Sums:
    """Of rows with `scores`: reward, reward_std (within a group, on average), equal_rewards,
    completion_length in tokens, cut (share of completions without a stop token), and `reward/NAME` of several
    rewards; of rows with a critic's values, what `averages` makes the explained variance of. Empty where rows
    have no scores.
    """
    sums: Sums = {}
    for row in rows:
        scores = row.get("scores") or []
        add(sums, "reward", scores)
        if len(scores) > 1:
            add(sums, "reward_std", [statistics.pstdev(scores)])
            add(sums, EQUAL, [float(min(scores) == max(scores))])
        if scores:
            completions = [ids for ids in row.get("completions") or [] if not isinstance(ids, str)]
            add(sums, "completion_length", [len(ids) for ids in completions])
            add(sums, "cut", row.get("truncated") or [])
        for name, values in (row.get("rewards") or {}).items():
            add(sums, f"reward/{name}", values)
        for returns, values in zip(row.get("returns") or [], row.get("old_values") or [], strict=False):
            errors = [r - v for r, v in zip(returns, values, strict=True)]
            for name, numbers in ((RETURN, returns), (ERROR, errors)):
                add(sums, name, numbers)
                add(sums, f"{name}_square", [x * x for x in numbers])
    return sums


def add(sums: Sums, name: str, values: Sequence[float]) -> None:
    """Add values to one of the sums."""
    if values:
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + float(sum(values)), count + len(values))


def averages(sums: Sums) -> dict[str, float]:
    """Name -> mean; and `explained_variance`, 1 - Var(return - value) / Var(return)."""
    means = {name: total / count for name, (total, count) in sums.items() if count}
    if RETURN in means:
        spread = means[RETURN_SQUARE] - means[RETURN] ** 2
        missed = means[ERROR_SQUARE] - means[ERROR] ** 2
        if spread > 0:
            means[EXPLAINED] = 1 - missed / spread
    return {name: mean for name, mean in means.items() if not name.startswith("\0")}


def equal_steps(log: Sequence[dict[str, Any]]) -> str:
    """A sentence where in a fifth of the logged steps or more every group had equal rewards; else empty."""
    measured = [line[EQUAL] for line in log if EQUAL in line]
    equal = measured.count(1.0)
    if not measured or equal < 0.2 * len(measured):
        return ""
    steps = f"in {equal:,} of {len(measured):,} logged steps"
    result = "these steps taught nothing about rewards"
    if equal == len(measured):
        steps, result = f"in all {equal:,} logged steps", "nothing was learned from rewards"
    return (
        f"{steps} all completions of every group had the same reward, so advantages were 0: {result}; use"
        " easier or harder prompts, a reward with more than two values, or more samples for each prompt"
    )
