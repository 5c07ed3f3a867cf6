"""multitask: tasks count alike whatever their sizes; what reduces to sft; focal by hand."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import average, batch_of, cast, gradients, same, tokens
from luthier.registry import build

ROLES = cast()


def rows_of(sizes: dict[str, list[int]]) -> list[dict]:
    """task -> the length of each of its rows' answers."""
    rng, rows = torch.Generator().manual_seed(3), []
    for task, lengths in sizes.items():
        for k, n in enumerate(lengths):
            row = {"id": f"{task}{k}", "prompt": tokens(3, rng), "completions": [tokens(n, rng)]}
            rows.append({**row, "scores": [0.0], "source": task})
    return rows


def objective(*sources: str, **settings):
    return build("objective", {"name": "multitask", "sources": list(sources), **settings})


def value(made, rows, roles=ROLES) -> float:
    return float(average(made, roles, batch_of(rows)).detach())


def test_tasks_count_alike_whatever_their_sizes():
    """100 tokens of one task, 10 of another: the mean of two token means; copies of a task change nothing."""
    rows = rows_of({"a": [40, 60], "b": [10]})
    sft = build("objective", "sft")
    a, b = value(sft, rows[:2]), value(sft, rows[2:])
    both = objective("a", "b")
    assert value(both, rows) == pytest.approx((a + b) / 2, rel=1e-6)
    copies = rows + [{**row, "id": row["id"] + "'"} for row in rows[:2]]
    assert value(both, copies) == pytest.approx(value(both, rows), rel=1e-6)
    assert abs(value(sft, copies) - value(sft, rows)) > 1e-4
    weighted = objective("a", "b", weights={"a": 3.0})
    assert value(weighted, rows) == pytest.approx((3 * a + b) / 4, rel=1e-6)
    samples = (value(sft, rows[:1]) + value(sft, rows[1:2])) / 2
    assert value(objective("a", "b", per="samples"), rows) == pytest.approx((samples + b) / 2, rel=1e-6)


def test_one_task_of_equal_lengths_is_sft_in_every_mode():
    rows = rows_of({"a": [6, 6, 6]})
    results = []
    for made in (build("objective", "sft"), objective("a"), objective("a", per="samples")):
        roles = cast()
        average(made, roles, batch_of(rows)).backward()
        results.append(gradients(roles.policy.model))
    same(results[0], results[1])
    same(results[0], results[2])


def test_focal_by_hand_and_without_gamma_it_is_sft():
    rows, sft = rows_of({"a": [7]}), build("objective", "sft")
    batch = batch_of(rows)
    logprobs = ROLES.policy.logprobs(batch).detach()
    for per in ("tokens", "samples"):
        want = float((1 - logprobs.exp().mean()) ** 1.5 * -logprobs.mean())
        assert value(objective("a", gamma=1.5, per=per), rows) == pytest.approx(want, rel=1e-5)
        assert value(objective("a", gamma=0.0, per=per), rows) == pytest.approx(value(sft, rows), rel=1e-6)


def test_rows_of_other_sources_are_named():
    assert "of source b" in objective("a").row_warnings(rows_of({"a": [2], "b": [2]}))[0]
    with pytest.raises(Exception, match="not among"):
        objective("a", weights={"b": 1.0})
