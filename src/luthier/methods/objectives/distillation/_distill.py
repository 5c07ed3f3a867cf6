"""Distillation over the full vocabulary: the logits of both models are compared in chunks and never held all
at once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.objectives._base import Objective
from luthier.registry import Range, family


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [..., V] -> [...]."""
    return (p.exp() * (p - q)).sum(-1)


def topped(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both on p's k likeliest outcomes and one bucket for all others: [..., k + 1].
    Log-probabilities again.
    """
    top, ids = p.topk(k)

    def bucket(x: Tensor) -> Tensor:
        return x.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)

    return torch.cat([top, bucket(p)], -1), torch.cat([q.gather(-1, ids), bucket(q)], -1)


@family
class Distill(Objective):
    """Family: a method defines the divergence between two distributions. Teacher and policy share a
    vocabulary.
    """

    costs: ClassVar[str] = "as `sft`, with the distributions over the vocabulary compared at each token."
    starting_rate: ClassVar[str] = "that of `sft`."

    # compare the teacher's k most likely tokens and the rest as one; 0: the whole vocabulary
    k: Annotated[int, Field(ge=0)] = 0
    # softens both distributions; the loss is multiplied by its square
    temperature: Annotated[float, Field(gt=0), Range(1.0, 4.0)] = 1.0

    def apart(self, teacher: Tensor, policy: Tensor) -> Tensor:
        """Log-probabilities of both, [C, outcomes] -> [C]."""
        raise NotImplementedError

    def loss(self, roles, batch):
        def of(z: Tensor, teacher: Tensor) -> Tensor:
            p, q = ((x / self.temperature).log_softmax(-1) for x in (teacher, z))
            return self.apart(*(topped(p, q, self.k) if 0 < self.k < p.shape[-1] else (p, q)))

        apart = roles.policy.outputs(batch).apply(of, beside=[roles.teacher.outputs(batch)])
        batch.note(divergence=apart)
        return self.temperature**2 * apart  # gradients stay of one size whatever the temperature
