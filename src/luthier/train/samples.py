"""What the samples of a step were worth: rewards, their spread, groups in which all are alike, lengths.

Objectives that compare the samples of a prompt with each other learn nothing from a group of equal rewards,
and their loss, which is about 0 in any case, does not show it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

EQUAL = "equal_rewards"  # the share of groups, of two samples or more, whose rewards are all the same


def sample_metrics(rows: Sequence[dict], reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Of rows with `scores`: reward, reward_std (within a group, on average), equal_rewards,
    completion_length in tokens, cut (share of completions without a stop token), and `reward/NAME` of several
    rewards. Empty where rows have no scores.

    reduce: the sum of a tensor over processes.
    """
    names: tuple[str, ...] = ("reward", "reward_std", EQUAL, "completion_length", "cut")
    sums: dict[str, float] = dict.fromkeys(names, 0.0)
    counts: dict[str, int] = dict.fromkeys(names, 0)
    for row in rows:
        scores = row.get("scores") or []
        add(sums, counts, "reward", scores)
        if len(scores) > 1:
            add(sums, counts, "reward_std", [statistics.pstdev(scores)])
            add(sums, counts, EQUAL, [float(min(scores) == max(scores))])
        if scores:
            completions = [ids for ids in row.get("completions") or [] if not isinstance(ids, str)]
            add(sums, counts, "completion_length", [len(ids) for ids in completions])
            add(sums, counts, "cut", row.get("truncated") or [])
    totals = reduce(torch.tensor([*sums.values(), *counts.values()], dtype=torch.float64)).tolist()
    metrics = {}
    for i, name in enumerate(sums):
        if totals[i + len(sums)]:
            metrics[name] = totals[i] / totals[i + len(sums)]
    return {**metrics, **named_rewards(rows)}


def add(sums: dict[str, float], counts: dict[str, int], name: str, values: Sequence[float]) -> None:
    """Add values to one of the sums."""
    sums[name] += float(sum(values))
    counts[name] += len(values)


def named_rewards(rows: Sequence[dict]) -> dict[str, float]:
    """reward/NAME -> its mean over this process's completions, where there are several rewards."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, scores in (row.get("rewards") or {}).items():
            values.setdefault(f"reward/{name}", []).extend(scores)
    return {name: statistics.fmean(scores) for name, scores in values.items() if scores}


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
