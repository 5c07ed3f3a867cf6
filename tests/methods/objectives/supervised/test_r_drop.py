"""r_drop: sft where nothing is drawn, and else likelihoods and divergence of two passes."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import batch_of, by_hand, cast, make_rows
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.model.policy import Policy, Roles
from luthier.registry import build


def drawn(parts: int) -> Roles:
    """A network whose adapters draw one of so many parts in each pass."""
    torch.manual_seed(4)
    net = cast().policy.model
    attached = build("tuner", {"name": "mosa", "bottleneck": 8, "parts": parts}).attach(net)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=0.5)
    return Roles(Policy(Causal(), net, attached).train(), Clock(), cast().renderer)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("likelihood", ["both", "first"])
def test_it_is_the_likelihoods_and_the_divergence_of_two_passes(parts, likelihood):
    roles, batch = drawn(parts), batch_of(make_rows(3, k=1))
    made = build("objective", {"name": "r_drop", "kl_weight": 0.7, "likelihood": likelihood})
    torch.manual_seed(1)  # of which the two passes draw different parts
    passes = [roles.policy(batch).apply(lambda z: z.log_softmax(-1)) for _ in range(2)]
    torch.manual_seed(1)
    loss = made.loss(roles, batch)
    p, q = (one.exp() for one in passes)
    labels = batch.labels[batch.targets][:, None]
    own = [-one.gather(1, labels)[:, 0] for one in passes]
    apart = (by_hand(p, q) + by_hand(q, p)) / 2
    nll = own[0] if likelihood == "first" else (own[0] + own[1]) / 2
    assert torch.allclose(loss, nll + 0.7 * apart, atol=1e-5)
    assert (float(apart.detach().max()) > 0.01) == (parts > 1)
    if parts == 1:
        sft = build("objective", "sft").loss(roles, batch)
        assert torch.allclose(loss, sft, atol=1e-6) and float(batch.metrics["divergence"][0]) < 1e-6
