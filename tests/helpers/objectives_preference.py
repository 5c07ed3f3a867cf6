"""What tests of objectives_preference share."""

from __future__ import annotations

import torch


def fitted(objective, roles, rows, weights=None, steps: int = 60) -> torch.Tensor:
    """[arms] log-policy at the minimum of the (weighted) mean loss."""
    from luthier.toy import bandit

    batch = bandit.batch_of(rows)
    optimizer = torch.optim.LBFGS(
        roles.policy.parameters(), lr=0.5, max_iter=steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        values = objective.loss(roles, batch)
        value = (values if weights is None else values * weights).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return roles.policy.log_policy().detach()
