"""fait: without weights is sft on the right ones; faits weights are constants and grow with confusion;
learns where programs differ.
"""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import batch_of, cast, fit, loss_of, pair_rows, small_llama
from luthier.registry import build


def fait_rows() -> list[dict]:
    rows = pair_rows()
    rng = torch.Generator().manual_seed(1)
    draw = lambda: [
        [[float(torch.rand((), generator=rng) > 0.5) for _ in c] for c in r["completions"]] for r in rows
    ]  # noqa: E731
    return [{**r, "line_mask": x, "token_mask": y} for r, x, y in zip(rows, draw(), draw(), strict=True)]


def test_fait_without_weights_is_sft_on_the_right_ones():
    rows = fait_rows()
    assert torch.equal(
        loss_of({"name": "fait", "a": 0.0, "b": 0.0}, rows=rows), loss_of("chosen_sft", rows=rows)
    )


def test_faits_weights_are_constants_and_grow_with_confusion():
    rows, roles = fait_rows(), cast()
    made, batch = build("objective", "fait"), batch_of(rows)
    weights = made.weights(roles, batch)
    assert not weights.requires_grad and (weights >= 1).all()
    loss = made.loss(roles, batch).sum()
    want = (weights[made.chosen(batch)] * -roles.policy.logprobs(batch)[made.chosen(batch)]).sum()
    torch.testing.assert_close(loss, want)
    one = {
        **rows[0],
        "line_mask": [[0.0] * len(c) for c in rows[0]["completions"]],
        "token_mask": [[1.0] * len(c) for c in rows[0]["completions"]],
    }
    turned = {**one, "scores": one["scores"][::-1]}
    found = {}
    for row in (one, turned):
        b = batch_of([row])
        w = made.weights(roles, b)
        found[b.metrics["gap"][0] < 0] = float(w.max())
    assert found[True] > found[False], "the weight is larger where the model prefers the wrong one"


@pytest.mark.long
def test_fait_learns_where_programs_differ():
    """Everything but one token is common to right and wrong: how likely that token becomes, at equal
    steps.
    """
    rng = torch.Generator().manual_seed(0)
    rows = []
    for i in range(48):
        head = torch.randint(3, 12, (1,), generator=rng).tolist()
        common = torch.randint(3, 12, (10,), generator=rng).tolist()
        right, wrong = 20 + head[0] % 4, 30
        mask = [[0.0] * 5 + [1.0] + [0.0] * 5] * 2
        said = [[*common[:5], x, *common[5:]] for x in (right, wrong)]
        rows.append(
            {
                "id": str(i),
                "prompt": head,
                "completions": said,
                "scores": [1.0, 0.0],
                "line_mask": mask,
                "token_mask": mask,
            }
        )
    found = {}
    for name in ("chosen_sft", {"name": "fait", "b": 3.0}):
        roles = small_llama()
        fit(roles, build("objective", name), rows, steps=25, size=16)
        batch = batch_of(rows)
        at = (batch.place == 5) & (batch.owner % 2 == 0)
        found[str(name)] = float(roles.policy.logprobs(batch).detach()[at].mean())
    fait, sft = found.pop("{'name': 'fait', 'b': 3.0}"), found.pop("chosen_sft")
    assert fait > sft + 0.05
