"""morepair: is the weighted mean of two likelihoods; learns both."""

from __future__ import annotations

import pytest

from helpers.objectives import average, batch_of, cast, fit, gradients, make_rows, same, small_llama
from luthier.registry import build


def repair_rows(n: int = 6) -> list[dict]:
    return [{**r, "tasks": ["answer", "rationale"]} for r in make_rows(n, k=2)]


def test_morepair_is_the_weighted_mean_of_two_likelihoods():
    rows, roles = repair_rows(), cast()
    one, other = (
        [{**r, "completions": [r["completions"][k]], "scores": [0.0]} for r in rows] for k in range(2)
    )
    apart = [float(average(build("objective", "sft"), roles, batch_of(r)).detach()) for r in (one, other)]
    for beta in (1.0, 0.3):
        got = float(
            average(build("objective", {"name": "morepair", "beta": beta}), roles, batch_of(rows)).detach()
        )
        assert got == pytest.approx((apart[0] + beta * apart[1]) / (1 + beta), rel=1e-5)
    found = []
    for objective, some in (
        (build("objective", {"name": "morepair", "beta": 0.0}), rows),
        (build("objective", "sft"), one),
    ):
        fresh = cast()
        average(objective, fresh, batch_of(some)).backward()
        found.append(gradients(fresh.policy.model))
    same(*found)


def test_morepair_learns_both():
    rows, roles = repair_rows(12), small_llama()
    tasks = [build("objective", {"name": "task_sft", "task": t}) for t in ("answer", "rationale")]
    measure = lambda: [float(average(t, roles, batch_of(rows)).detach()) for t in tasks]  # noqa: E731
    before = measure()
    fit(roles, build("objective", "morepair"), rows, steps=15, size=8)
    assert all(b < a - 0.1 for a, b in zip(before, measure(), strict=True))
