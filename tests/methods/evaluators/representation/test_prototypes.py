"""prototypes: merged means are those of all rows, later classes only compete, and a network's states."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.evaluators.representation.prototypes import (
    Prototypes,
    accuracy,
    bytes_of,
    means,
    merged,
    nearest,
)


def clusters(count: int, seed: int = 0, width: int = 16) -> dict[str, torch.Tensor]:
    """Class -> 20 rows around a centre of its own."""
    rng = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(count, width, generator=rng, dtype=torch.float64)
    noise = torch.randn(count, 20, width, generator=rng, dtype=torch.float64)
    return {f"{k:02}": centres[k] + noise[k] for k in range(count)}


def test_merged_means_are_those_of_all_rows():
    """Whatever the client and the order; a class that one client alone has is as it sent it."""
    rows = clusters(5)
    everything = means(rows)
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        sent = []
        for client in range(4):
            parts = {}
            for k, (name, x) in enumerate(rows.items()):
                owner = torch.randint(4, (len(x),), generator=torch.Generator().manual_seed(seed + k))
                if (owner == client).any():
                    parts[name] = x[owner == client]
            sent.append(means(parts))
        order = torch.randperm(4, generator=rng).tolist()
        whole = merged(sent[k] for k in order)
        assert whole.keys() == rows.keys()
        for name, (mean, count) in whole.items():
            assert count == 20 and torch.allclose(mean, everything[name][0], atol=1e-9)
        assert bytes_of(sent[0]) == len(sent[0]) * (16 + 1) * 4
    assert torch.equal(merged([means({"a": rows["00"]})])["a"][0], rows["00"].mean(0))


def test_later_classes_only_compete():
    """A row's class changes only to one that has arrived since."""
    rows = clusters(10, width=2)
    whole = means(rows)
    some = {name: whole[name] for name in list(rows)[:5]}
    changed = 0
    for name in some:
        for before, after in zip(nearest(some, rows[name]), nearest(whole, rows[name]), strict=True):
            assert after == before or after not in some
            changed += after != before
    assert changed, "in two dimensions some rows are nearer to a later class"
    early = {name: rows[name] for name in some}
    assert accuracy(whole, early) <= accuracy(some, early)


def test_a_network_tells_letters_apart(roles, tmp_path):
    """Also an untuned network's last state differs by the letter that a prompt ends with."""
    rows = [{"id": f"{k:02}", "prompt": f"{k} {'abc'[k % 3]}", "kind": "abc"[k % 3]} for k in range(48)]
    method = Prototypes(column="kind", clients=3)
    out = method.run(roles, rows, tmp_path, "after")
    assert out["prototype_accuracy"] == out["prototype_accuracy/3"] > 0.8
    width = next(iter(method.states(roles, rows[:1]).values())).numel()
    assert out["prototype_bytes"] == 3 * 3 * (width + 1) * 4
    alone = Prototypes(column="kind", clients=1).run(roles, rows, tmp_path, "after")
    assert alone["prototype_accuracy"] == pytest.approx(out["prototype_accuracy"])
    assert method.run(roles, rows[:1], tmp_path, "after") == {}
