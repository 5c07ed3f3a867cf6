"""hft: moves half of the layers; counts as the paper does; rests and redraws; with everything is full
tuning.
"""

from __future__ import annotations

import pytest
import torch

from helpers.subset_tuners import base, put, state_bytes, train
from luthier.clock import Clock
from luthier.methods.tuners.subset.hft import half
from luthier.model.anatomy import kind_of, layer_of


def blocks(attached) -> tuple[int, int]:
    sizes = {n: p.numel() for n, p in attached.model.named_parameters() if layer_of(n)}
    return sum(s for n, s in sizes.items() if attached.model.get_parameter(n).requires_grad), sum(
        sizes.values()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_hft_moves_half_of_the_layers(kind):
    moving, every = blocks(put("hft", base(kind)))
    assert abs(moving / every - 0.5) < 0.02


def test_hft_counts_as_the_paper_does():
    """2 of 4 in attention, 1 or 2 of 3 in the feed-forward, half the layers each, 1 of 2 norms."""
    shape = {n: 1 for n, _ in base().named_parameters() if layer_of(n)}
    live = half(shape, 0.5, torch.Generator().manual_seed(0))
    of = lambda i, kind: sum(layer_of(n)[1] == i and kind_of(n) == kind for n in live)
    assert all(of(i, "attention") == 2 and of(i, "norm") == 1 for i in range(4))
    assert sorted(of(i, "feed-forward") for i in range(4)) == [1, 1, 2, 2]


def test_hft_rests_and_redraws():
    attached = put("hft", embeddings=False)
    before, clock = attached.tensors(), Clock(seed=4, total=3)
    chain = train(attached, 3, seed=4)
    moved = {k for k, v in attached.tensors().items() if not torch.equal(v, before[k])} - {"draw"}
    assert (
        moved == set(s.name + ".weight" for s in attached.param_groups())
        and {f"{n}.weight" for n in chain.state} == moved
    )
    full = train(put("full"), 3)
    assert state_bytes(chain.state) < 0.55 * state_bytes(full.state)
    other = put("hft", embeddings=False)
    train(other, 3, seed=4)
    # the same seed, the same half
    assert {s.name for s in other.param_groups()} == {s.name for s in attached.param_groups()}
    attached.begin_step(clock)  # the next stage goes on from here
    assert {s.name for s in attached.param_groups()} != {s.name for s in other.param_groups()}


def test_hft_with_everything_is_full_tuning():
    one, two = put("hft", ratio=1.0), put("full")
    train(one), train(two)
    assert all(torch.equal(v, one.tensors()[k]) for k, v in two.tensors().items())
