"""look: is the soft vote of nearest neighbours without oneself; reads the memory as it was and not the row
itself; keeps what a class is made of.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from helpers.objectives import batch_of, cast, make_rows
from luthier.methods.objectives.representation._features import classes, features, of_rows
from luthier.methods.objectives.representation.look import vote
from luthier.methods.roles.features.memory import Features
from luthier.registry import build


def test_look_is_the_soft_vote_of_nearest_neighbours_without_oneself():
    near = torch.tensor([[9.0, 2.0, 1.0, 0.5, -1.0]])  # itself, then: other class, own class, other, own
    itself, same = (
        torch.tensor([[True, False, False, False, False]]),
        torch.tensor([[True, False, True, False, True]]),
    )
    e = math.exp
    for k, want in (
        (9, (e(1) + e(-1)) / (e(2) + e(1) + e(0.5) + e(-1))),
        (3, e(1) / (e(2) + e(1) + e(0.5))),
        # none of its class is among the nearest: the nearest of its class is added
        (1, e(1) / (e(2) + e(1))),
    ):
        got, found = vote(near, itself, same, k)
        assert found.tolist() == [True] and float(got.exp()) == pytest.approx(want, abs=1e-6)
    assert not vote(near, itself, itself, 3)[1].any(), "of its class it knows only itself"


def test_look_reads_the_memory_as_it_was_and_not_the_row_itself():
    objective, rows = build("objective", {"name": "look", "k": 4}), make_rows(4, k=1)
    for r in rows[1:]:
        r["completions"] = rows[0]["completions"]  # one class
    batch = batch_of(rows)
    roles = cast(memory=Features(8, 16))
    assert objective.loss(roles, batch).eq(0).all(), "nothing is remembered yet"
    roles.memory.after_step(None)
    assert (
        roles.memory.count == 4
        and len(set(classes(batch).tolist())) == 1
        and len(set(of_rows(batch).tolist())) == 4
    )
    # all neighbours agree
    torch.testing.assert_close(objective.loss(roles, batch_of(rows)), torch.zeros(4), atol=1e-6, rtol=0)
    alone = cast(memory=Features(8, 16))
    alone.memory.remember(
        of_rows(batch)[:1], classes(batch)[:1], features(batch, alone.policy.outputs(batch))[:1]
    )
    alone.memory.after_step(None)
    assert objective.loss(alone, batch_of(rows[:1])).eq(0).all()


@pytest.mark.slow
@pytest.mark.long
def test_look_keeps_what_a_class_is_made_of():
    """Two classes of two kinds of points each, seen through two numbers; then the kinds are told apart by a
    linear probe.
    """
    from torch import nn

    def probe(seed: int, spec: str | dict) -> float:
        rng = torch.Generator().manual_seed(seed)
        middle = 2 * torch.randn(4, 10, generator=rng)
        kind = torch.arange(400) % 4
        x = middle[kind] + torch.randn(400, 10, generator=rng)
        rows = [{"id": i, "prompt": [3], "completions": [[4 + i % 2]]} for i in range(400)]
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
        head = nn.Linear(2, 2)
        memory, objective = Features(200, 2), build("objective", "look")
        optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], 1e-2)
        for _ in range(150):
            some = torch.randint(200, (32,), generator=rng).tolist()
            batch, z = batch_of([rows[i] for i in some]), net(x[some])
            said = SimpleNamespace(outputs=lambda _, z=z: SimpleNamespace(hidden=z))
            if spec == "look":
                loss = objective.loss(SimpleNamespace(policy=said, teacher=said, memory=memory), batch).mean()
                memory.after_step(None)
            else:
                loss = nn.functional.cross_entropy(head(z), kind[some] % 2)
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            z = net(x)
        z = nn.functional.normalize(z, dim=1)
        top = nn.Linear(2, 4)
        fit = torch.optim.LBFGS(top.parameters(), max_iter=100)

        def cost():
            fit.zero_grad()
            value = nn.functional.cross_entropy(top(z[:200]), kind[:200])
            value.backward()
            return value

        fit.step(cost)
        return float((top(z[200:]).argmax(1) == kind[200:]).float().mean())

    found = [(probe(seed, "look"), probe(seed, "cross-entropy")) for seed in range(3)]
    assert sum(a > b for a, b in found) >= 2 and sum(a - b for a, b in found) > 0.15
