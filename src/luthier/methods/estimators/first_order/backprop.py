"""The usual gradient: one backward pass over the global batch."""

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.registry import estimator


@estimator(
    provides=[GRADIENT],
    use_when="nothing speaks against it: it is the default.",
    costs="one forward and one backward pass; activations are kept for the backward pass.",
)
class Backprop(Estimator):
    """Reverse-mode differentiation."""

    single_backward = True

    def step(self, closure, chain, clock):
        loss = closure()
        chain.step(gradients(chain))
        return loss
