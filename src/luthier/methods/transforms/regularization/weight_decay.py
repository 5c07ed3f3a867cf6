"""Decoupled weight decay: a pull towards zero that does not pass through the gradient's statistics."""

import torch

from luthier.methods.transforms._base import Each
from luthier.registry import transform


@transform(
    paper="arXiv:1711.05101",
    use_when="weights or factors grow too large, or you write AdamW by hand; behind the rescaling.",
    costs="nothing.",
)
class WeightDecay(Each):
    """update + weight_decay * p. Place it after the rescaling (adam, lion) to decouple it."""

    pointwise = True
    together = True

    weight_decay: float = 0.01  # coefficient; multiplied by the learning rate at each step
    everything: bool = False  # decay biases, norms and other vectors too

    def update(self, grad, state, param, step):
        if not self.weight_decay or (param.ndim < 2 and not self.everything):
            return grad
        return grad.add(param, alpha=self.weight_decay)

    def update_together(self, grads, states, params, step):
        if not self.weight_decay:
            return grads
        decayed = [i for i, p in enumerate(params) if p.ndim >= 2 or self.everything]
        if decayed:
            some = torch._foreach_add(
                [grads[i] for i in decayed], [params[i] for i in decayed], alpha=self.weight_decay
            )
            grads = list(grads)
            for i, grad in zip(decayed, some, strict=True):
                grads[i] = grad
        return grads
