"""adam_v2: regions are wholes and their parts read alone; parts of a linear reader compose exactly; wholes
find their parts.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from helpers.objectives import batch_of
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.objectives.representation.adam_v2 import long_enough, means, regions
from luthier.methods.roles.networks.part_whole import Heads
from luthier.registry import build


class Reads:
    """A role whose states are a function of the tokens it reads."""

    def __init__(self, f):
        self.f = f

    def outputs(self, batch):
        return SimpleNamespace(hidden=self.f(batch.ids[batch.supervised]))


def whole_texts(n: int, length: int, seed: int = 0) -> list[dict]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {"id": i, "prompt": [3, 4], "completions": [torch.randint(3, 40, (length,), generator=rng).tolist()]}
        for i in range(n)
    ]


def test_regions_are_wholes_and_their_parts_read_alone():
    rows = whole_texts(3, 8) + [
        {"id": "short", "prompt": [], "completions": [[5, 6, 7]]},
        {"id": "bare", "prompt": [], "completions": [[*range(8, 16)]]},
    ]
    batch = batch_of(rows)
    assert long_enough(batch, 2) == [0, 1, 2, 4]
    cut = regions(batch, 2, 0, Clock())
    said = [cut.labels[p].tolist() for p in cut.segments()]
    parents = cut.parent.tolist()
    for n, row in enumerate(rows[:3] + rows[4:]):
        whole, *parts = (int(s) for s in cut.completion[3 * n : 3 * n + 3])
        assert said[whole] == row["completions"][0] == said[parts[0]] + said[parts[1]]
        assert all(said[parents[s]] == row["prompt"] for s in (whole, *parts)), (
            "each continues what the text continues, and not its neighbours"
        )
    assert cut.lengths.tolist() == [8, 4, 4] * 3 + [7, 3, 3], "a token that nothing precedes is not asked"
    halves = regions(batch, 2, 1, Clock())
    assert [len(halves.labels[halves.segments()[int(s)]]) for s in halves.completion[:3]] == [4, 2, 2]
    assert regions(batch_of([rows[3]]), 2, 0, Clock()) is None


def test_parts_of_a_linear_reader_compose_exactly():
    """Embeddings that are linear in tokens, a composer that is the mean: what the parts make is the whole."""
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    roles = SimpleNamespace(
        policy=Reads(lambda ids: table[ids]),
        teacher=Reads(lambda ids: table[ids]),
        part_heads=Heads(6, 2, trained=False),
        clock=Clock(),
        renderer=SimpleNamespace(tokenizer=range(40)),
    )
    batch = batch_of(whole_texts(5, 8))
    only = lambda **weights: build(
        "objective",
        {
            "name": "adam_v2",
            "noise": 0.0,
            "localizability": 0,
            "composability": 0,
            "decomposability": 0,
            **weights,
        },
    )
    torch.testing.assert_close(only(composability=1).loss(roles, batch), torch.zeros(5), atol=1e-6, rtol=0)
    assert (only(decomposability=1).loss(roles, batch) > 0.01).all()
    whole = build("objective", {"name": "adam_v2", "noise": 0.0}).loss(roles, batch)
    apart = [
        only(**{k: 1}).loss(roles, batch) for k in ("localizability", "composability", "decomposability")
    ]
    torch.testing.assert_close(whole, sum(apart))
    alike = SimpleNamespace(
        **{
            **vars(roles),
            "policy": Reads(lambda ids: torch.ones(len(ids), 6)),
            "teacher": Reads(lambda ids: torch.ones(len(ids), 6)),
        }
    )
    assert only(localizability=1).loss(alike, batch).abs().max() < 1e-6, "near-duplicates are no contrast"
    with pytest.raises(RecipeError, match="the same value in both"):
        build("objective", {"name": "adam_v2", "parts_of_whole": 3}).loss(roles, batch)


@pytest.mark.slow
@pytest.mark.long
def test_wholes_find_their_parts():
    """Texts of two of twelve kinds of parts: the whole tells which part stands first in it, and which
    second.
    """
    from torch import nn

    def found(seed: int, **weights) -> float:
        rng = torch.Generator().manual_seed(seed)
        kinds = torch.randint(3, 40, (12, 4), generator=rng)
        pick = torch.stack([torch.randperm(12, generator=rng)[:2] for _ in range(60)])
        rows = [
            {"id": i, "prompt": [3], "completions": [kinds[p].flatten().tolist()]} for i, p in enumerate(pick)
        ]
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        teacher, heads = copy.deepcopy(net), Heads(16, 2)
        roles = SimpleNamespace(
            policy=Reads(net),
            teacher=Reads(lambda ids: teacher(ids).detach()),
            part_heads=heads,
            clock=Clock(total=80),
            renderer=SimpleNamespace(tokenizer=range(40)),
        )
        objective = build("objective", {"name": "adam_v2", "levels": 1, **weights})
        optimizer = torch.optim.Adam([*net.parameters(), *heads.parameters()], 3e-3)
        for roles.clock.step in range(80):
            loss = objective.loss(
                roles, batch_of([rows[i] for i in torch.randint(60, (24,), generator=rng).tolist()])
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for a, b in zip(teacher.parameters(), net.parameters(), strict=True):
                    a.lerp_(b, 0.05)
        with torch.no_grad():
            cut = regions(batch_of(rows), 2, 0, roles.clock)
            z = means(cut, roles.policy.outputs(cut), 2)
            told = nn.functional.normalize(heads.decompose(z[:, 0]), dim=-1)  # [texts, 2, d]
        places = [[int((pick == kind).nonzero()[0, i]) for i in (0, 1)] for kind in range(12)]
        # one of each kind
        parts = nn.functional.normalize(torch.stack([z[text, 1 + place] for text, place in places]), dim=-1)
        return float(((told @ parts.T).argmax(-1) == pick).float().mean())

    scores = [(found(seed), found(seed, composability=0, decomposability=0)) for seed in range(3)]
    assert sum(a > b + 0.1 for a, b in scores) >= 2
