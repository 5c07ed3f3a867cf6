"""d3po: is dpo step by step."""

from __future__ import annotations

import torch

from helpers.objectives import batch_of, cast, gradients, loss_of, network, pair_rows
from luthier.registry import build


def test_d3po_is_dpo_step_by_step():
    rows = pair_rows()
    at_start = loss_of("d3po", cast(reference=network()), rows)
    torch.testing.assert_close(at_start, torch.full_like(at_start, 0.6931472), atol=1e-5, rtol=0)
    made, batch = build("objective", {"name": "d3po", "eps": 0.999}), batch_of(rows)
    shorter = [min(len(r["completions"][0]), len(r["completions"][1])) for r in rows]
    assert made.count(batch) == sum(shorter)
    near = cast(reference=network(off_by=0.002))
    # one step a side, and no ratio near its bounds
    whole = loss_of({"name": "d3po", "eps": 0.5, "step": 100}, near, rows)
    torch.testing.assert_close(whole, loss_of("dpo", near, rows), atol=1e-5, rtol=1e-5)
    far = cast(reference=network(seed=3))
    loss = build("objective", {"name": "d3po", "eps": 1e-6}).loss(far, batch)
    loss.sum().backward()
    assert all(not g.any() for g in gradients(far.policy.model).values()), (
        "beyond the bounds a step teaches nothing"
    )
