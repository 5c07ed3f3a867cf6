"""pairs: at the start a pair costs what no margin costs; symmetric contrasts; label smoothing of one half
takes no side; best and worst are picked by score and ties teach nothing.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.objectives import (
    average,
    batch_of,
    cast,
    gradients,
    loss_of,
    make_rows,
    network,
    pair_rows,
)
from luthier.recipe.recipe import terms
from luthier.registry import build


def test_at_the_start_a_pair_costs_what_no_margin_costs():
    roles = cast(reference=network())
    for spec, want in (("dpo", math.log(2)), ({"name": "ipo", "beta": 0.25}, 4.0), ("hinge", 1.0)):
        torch.testing.assert_close(loss_of(spec, roles), torch.full((4,), want), atol=1e-5, rtol=0)


def test_symmetric_contrasts():
    """S-VCO: no gap to the reference is four times log 2; the two answers may change places; the terms are
    those of the paper.
    """
    rows = make_rows(3, k=6, contrasts=[0, 1])
    torch.testing.assert_close(
        loss_of("s_vco", cast(reference=network()), rows), torch.full((3,), 4 * math.log(2))
    )
    turned = [{**r, "completions": r["completions"][3:] + r["completions"][:3]} for r in rows]
    torch.testing.assert_close(loss_of("s_vco", rows=rows), loss_of("s_vco", rows=turned), atol=1e-6, rtol=0)
    roles = cast()
    batch = batch_of(rows)
    gap = batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).view(3, 6)
    cost = lambda beta, better, worse: (
        -torch.nn.functional.logsigmoid(beta * (gap[:, better] - gap[:, worse]))
    )
    by_hand = cost(0.2, 0, 1) + cost(0.3, 1, 2) + cost(0.2, 3, 4) + cost(0.3, 4, 5)
    torch.testing.assert_close(
        loss_of({"name": "s_vco", "beta_attend": 0.2, "beta_reject": 0.3}, rows=rows),
        by_hand,
        atol=1e-5,
        rtol=1e-5,
    )


def test_label_smoothing_of_one_half_takes_no_side():
    turned = [{**r, "scores": r["scores"][::-1]} for r in pair_rows()]
    half = {"name": "dpo", "label_smoothing": 0.5}
    torch.testing.assert_close(loss_of(half), loss_of(half, rows=turned))
    assert not torch.allclose(loss_of("dpo"), loss_of("dpo", rows=turned))
    torch.testing.assert_close(loss_of({"name": "dpo", "label_smoothing": 1.0}), loss_of("dpo", rows=turned))


def test_best_and_worst_are_picked_by_score_and_ties_teach_nothing():
    rows = make_rows(3, k=4)
    rows[0]["scores"], rows[1]["scores"], rows[2]["scores"] = (
        [0.1, 0.9, -2.0, 0.5],
        [1.0] * 4,
        [3.0, 2.0, 1.0, 3.0],
    )
    picks = ((1, 2), (0, 0), (0, 2))  # best and worst
    pairs = [
        {**r, "completions": [r["completions"][i] for i in p], "scores": [1.0, 0.0]}
        for r, p in zip(rows, picks, strict=True)
    ]
    torch.testing.assert_close(loss_of("dpo", rows=rows), loss_of("dpo", rows=pairs))
    roles, tied = cast(), [rows[1]]
    loss_of("dpo", roles, tied).sum().backward()
    assert all(not g.any() for g in gradients(roles.policy.model).values())
    chosen, batch = build("objective", "chosen_sft"), batch_of(rows)
    assert chosen.count(batch) == len(rows[0]["completions"][1]) + len(rows[2]["completions"][0])
    assert chosen.count(batch_of(tied)) == 0 and chosen.loss(roles, batch_of(tied)).shape == (0,)
    build("objective", "dpo").loss(roles, batch)
    assert batch.metrics["accuracy"][1] == 2, "rows that do not tell their completions apart are not counted"


def test_metrics_of_pairs_agree():
    batch = batch_of(pair_rows())
    build("objective", "dpo").loss(cast(), batch)
    mean = {k: s / n for k, (s, n) in batch.metrics.items()}
    assert mean["margin"] == pytest.approx(mean["rewards/chosen"] - mean["rewards/rejected"], abs=1e-6)
    assert 0 <= mean["accuracy"] <= 1


def test_terms_add_up():
    roles, batch = cast(), batch_of(pair_rows())
    both = average(terms("dpo + 0.1*chosen_sft"), roles, batch)
    one, other = (average(build("objective", n), roles, batch) for n in ("dpo", "chosen_sft"))
    torch.testing.assert_close(both, one + 0.1 * other)
