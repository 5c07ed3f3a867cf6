"""Adam's rescaling: the running mean of the gradient over the root of the running mean of its square."""

import torch

from luthier.methods.transforms._base import Each
from luthier.registry import transform


@transform(
    paper="arXiv:1412.6980",
    use_when="you write a chain of your own: it is the rescaling within `adamw`.",
    costs="two fp32 numbers for each trainable parameter.",
    starting_rate="that of the tuner; AdamW's rates are meant everywhere in these pages.",
)
class Adam(Each):
    """m / (sqrt(v) + eps), both corrected for their zero start."""

    pointwise = True
    rescales = True

    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator

    def init(self, like):
        return {"m": torch.zeros_like(like), "v": torch.zeros_like(like)}

    def update(self, grad, state, param, step):
        m, v = state["m"].lerp_(grad, 1 - self.adam_beta1), state["v"].mul_(self.adam_beta2)
        v.addcmul_(grad, grad, value=1 - self.adam_beta2)
        root = (v / (1 - self.adam_beta2**step)).sqrt_().add_(self.adam_epsilon)
        return (m / (1 - self.adam_beta1**step)).div_(root)
