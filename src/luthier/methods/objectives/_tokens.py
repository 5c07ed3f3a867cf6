"""Token-level likelihoods: the loss of each supervised token, and its weight.

Weights come from the column `token_weights`, one number per supervised token. Stages write it (key_tokens,
...), and so do conversation turns with a `loss_scale`.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from luthier.methods.objectives._base import Objective
from luthier.model.batch import Batch
from luthier.registry import family


@family
class Tokens(Objective):
    """Family: a method defines the loss of a token."""

    # divide the weighted sum by the number of tokens, or by the sum of their weights
    normalize: Literal["tokens", "weights"] = "tokens"

    def cost(self, roles: Any, batch: Batch) -> Tensor:
        """[T] of each supervised token, unweighted."""
        raise NotImplementedError

    def loss(self, roles, batch):
        cost, weights = self.cost(roles, batch), batch.weights()
        return cost if weights is None else weights * cost

    def divisor(self, batch):
        weights = batch.weights() if self.normalize == "weights" else None
        return self.count(batch) if weights is None else float(weights.sum())
