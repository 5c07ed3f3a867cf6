"""What tests of objectives_supervised share."""

from __future__ import annotations

import torch

from helpers.models import make_llama
from helpers.objectives import V, average, batch_of, cast
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles


def small_llama(seed: int = 0) -> Roles:
    net = make_llama(
        seed,
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.05,
    )
    roles = cast()
    policy = Policy(Causal(), net, Untuned(net))
    return Roles(policy, Clock(total=1), roles.renderer)


def fit(roles: Roles, objective, rows: list[dict], steps: int, lr: float = 3e-3, size: int = 32) -> None:
    """Adam on batches of the rows."""
    adam = torch.optim.Adam(roles.policy.model.parameters(), lr=lr)
    roles.clock.total = steps
    roles.policy.train()
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        roles.clock.step = step
        some = torch.randint(len(rows), (size,), generator=rng).tolist()
        adam.zero_grad()
        average(objective, roles, batch_of([rows[i] for i in some])).backward()
        adam.step()
    roles.policy.eval()
