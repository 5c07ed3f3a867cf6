"""Objectives that look at hidden states: LOOK, parts and wholes, generated features; and the roles that go
with them.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from helpers.objectives import batch_of, cast
from luthier.clock import Clock
from luthier.kernels.logprobs import Head
from luthier.methods.roles.features.generator import Features as Made
from luthier.registry import build


def test_a_generator_says_what_all_neighbours_share_and_neighbours_are_others():
    made = Made(8, ["a", "b", "c", "d"], ["x"], 2, 4)
    q, k, v = (
        torch.randn(3, 1, 8),
        torch.randn(3, 2, 8),
        torch.nn.functional.normalize(torch.randn(3, 1, 8), dim=-1),
    )
    torch.testing.assert_close(
        made(q, k, v.expand(-1, 2, -1)).norm(dim=-1), torch.ones(3, 1), atol=1e-6, rtol=0
    )
    with torch.no_grad():
        made.attention.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        made.attention.out_proj.weight.copy_(torch.eye(8))
        for p in made.ffn.parameters():
            p.zero_()
    torch.testing.assert_close(made(q, k, v.expand(-1, 2, -1)), v, atol=1e-6, rtol=0)
    made.mean.copy_(torch.randn(4, 8))
    assert all(
        i not in row for i, row in enumerate(made.neighbours().tolist())
    ) and made.neighbours().shape == (4, 2)


def test_statistics_follow_states_and_a_row_counts_once():
    made = Made(4, ["a", "b"], ["x"], 1, 2, momentum=0.5)
    z = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0]])
    made.remember(torch.tensor([1, 2]), torch.tensor([0, 0]), z)
    made.after_step(None, momentum=0.0)
    assert (
        made.mean[0].tolist() == [0.5, 0.5, 0, 0]
        and made.spread()[0].tolist() == [0.5, 0.5, 0, 0]
        and float(made.size) == 2
    )
    for _ in range(2):
        made.remember(torch.tensor([1]), torch.tensor([0]), z[:1])
    made.after_step(None)
    assert made.mean[0].tolist() == [0.75, 0.25, 0, 0] and made.mean[1].eq(0).all()


class Answers:
    """A role that answers with classes: states of points, and an output layer."""

    def __init__(self, net, head, x):
        self.net, self.head, self.x = net, head, x
        self.model = SimpleNamespace(get_output_embeddings=lambda: head)

    def outputs(self, batch):
        from luthier.model.outputs import Outputs

        hidden = self.net(self.x[[row["id"] for row in batch.rows]])
        return Outputs(hidden, Head(self.head), batch.labels[batch.supervised])


def tuned_on_known(seed: int, **weights) -> tuple[float, torch.Tensor]:
    """Twelve classes whose points lie near a rotation of their features; six are learned. Accuracy on the
    other six.
    """
    from torch import nn

    rng = torch.Generator().manual_seed(seed)
    W = nn.functional.normalize(torch.randn(12, 16, generator=rng), dim=1)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=rng)).Q
    y = torch.arange(360) % 12
    x = 4 * W[y] @ turn + 0.8 * torch.randn(360, 16, generator=rng)
    torch.manual_seed(seed)
    net, head = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)), nn.Linear(16, 12, bias=False)
    head.weight.data = 4 * W
    known = (y < 6).nonzero()[:, 0]
    with torch.no_grad():  # a start that knows all classes a little, as a pretrained network does
        net[2].weight.zero_()
    skip = turn.T + 0.5 * torch.randn(16, 16, generator=rng)
    f = lambda x: x @ skip + net(x)
    late, make = copy.deepcopy(net), Made(16, [*"abcdef"], [*"ghijkl"], 3, 4)
    make.tokens.copy_(torch.arange(12))
    roles = SimpleNamespace(
        policy=Answers(f, head, x),
        teacher=Answers(lambda x: x @ skip + late(x).detach(), head, x),
        generator=make,
        clock=Clock(total=120),
    )
    rows = [{"id": i, "prompt": [3], "completions": [[int(c)]]} for i, c in enumerate(y)]
    make.remember(known, y[known], f(x[known]).detach())
    make.after_step(None, momentum=0.0)
    objective = build("objective", {"name": "ogen", **weights})
    optimizer = torch.optim.Adam([*net.parameters(), *make.parameters()], 2e-2)
    for roles.clock.step in range(120):
        batch = batch_of([rows[i] for i in known[torch.randint(len(known), (32,), generator=rng)].tolist()])
        loss = -roles.policy.outputs(batch).logprobs.mean() + objective.loss(roles, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        make.after_step(None)
        with torch.no_grad():
            for a, b in zip(late.parameters(), net.parameters(), strict=True):
                a.lerp_(b, 0.05)
    new = y >= 6
    with torch.no_grad():
        said = f(x[new]) @ head.weight[6:].T
    return float((said.argmax(1) == y[new] - 6).float().mean()), net[0].weight.detach()


OFF = {"reconstruction": 0, "base_classes": 0, "new_classes": 0, "distillation": 0}


@pytest.mark.slow
@pytest.mark.long
def test_ogen_keeps_classes_that_are_not_tuned_on():
    scores = [
        (tuned_on_known(seed, distillation=5.0)[0], tuned_on_known(seed, **OFF)[0]) for seed in range(3)
    ]

    assert sum(a for a, _ in scores) >= sum(b for _, b in scores) and sum(a >= b for a, b in scores) >= 2


def test_ogen_without_weights_is_nothing_and_warms_up():
    rows = [{"id": i, "prompt": [3], "completions": [[3 + i % 3]]} for i in range(6)]
    roles = cast()
    batch = batch_of(rows)
    assert build("objective", {"name": "ogen", **OFF}).loss(roles, batch).eq(0).all()
    build("objective", "ogen").loss(roles, batch)
    assert "ogen_unknown" not in batch.metrics and "ogen_reconstruction" in batch.metrics
    roles.clock.total, roles.clock.step = 10, 2
    build("objective", "ogen").loss(roles, batch)
    assert batch.metrics["ogen_unknown"][1] == 6
    strange = batch_of([{"id": 0, "prompt": [3], "completions": [[39]]}])
    assert build("objective", "ogen").loss(roles, strange).tolist() == [0.0], (
        "an answer of no known class is left to the other terms"
    )
