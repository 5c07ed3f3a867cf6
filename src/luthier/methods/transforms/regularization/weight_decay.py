"""Decoupled weight decay: a pull towards zero that does not pass through the gradient's statistics."""

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

    weight_decay: float = 0.01  # coefficient; multiplied by the learning rate at each step
    everything: bool = False  # decay biases, norms and other vectors too

    def update(self, grad, state, param, step):
        if not self.weight_decay or (param.ndim < 2 and not self.everything):
            return grad
        return grad.add(param, alpha=self.weight_decay)
