"""Clipping by global norm: scales all gradients of a step down together if their joint norm is too large."""

from luthier.methods.transforms._base import ScaledGradients, Transform, global_norm
from luthier.registry import transform


@transform(
    paper="arXiv:1211.5063",
    use_when="always, in front of the rescaling: single large gradients do no harm then.",
    costs="nothing.",
)
class Clip(Transform):
    """g * min(1, max_grad_norm / |g|), over all trainable tensors."""

    pointwise = True
    together = True

    max_grad_norm: float = 1.0  # maximum global norm; 0 = no limit

    def gather(self, every):
        if not self.max_grad_norm:
            return every
        small = min(1.0, self.max_grad_norm / (global_norm(every) + 1e-6))
        return every if small == 1.0 else ScaledGradients(every, small)

    def apply(self, grads, state, group, step):
        return grads

    def update_together(self, grads, states, params, step):
        return grads
