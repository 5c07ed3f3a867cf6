"""Adam's rescaling: the running mean of the gradient over the root of the running mean of its square."""

import torch

from luthier.methods.transforms._base import Each
from luthier.registry import transform


@transform(
    paper="arXiv:1412.6980",
    use_when="you write a chain of your own: it is the rescaling within `adamw`.",
    costs="two fp32 numbers for each trainable parameter.",
    starting_rate="that of the tuner; AdamW's rates are meant everywhere in these pages.",
    row="stable-ft-biomedical",
    covers="without bias correction the first step is (1 - beta1) / sqrt(1 - beta2) times as long.",
    tests=[
        "methods/optimizers/first_order/test_adamw.py::test_adam_without_bias_correction",
    ],
)
class Adam(Each):
    """m / (sqrt(v) + eps), both corrected for their zero start unless that is switched off."""

    pointwise = True
    rescales = True
    together = True

    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator
    # correct both means for their zero start; false: as in BERT's optimizer, whose first steps are larger
    bias_correction: bool = True

    def init(self, like):
        return {"m": torch.zeros_like(like), "v": torch.zeros_like(like)}

    def update(self, grad, state, param, step):
        m, v = state["m"].lerp_(grad, 1 - self.adam_beta1), state["v"].mul_(self.adam_beta2)
        v.addcmul_(grad, grad, value=1 - self.adam_beta2)
        if not self.bias_correction:
            return m / v.sqrt().add_(self.adam_epsilon)
        root = (v / (1 - self.adam_beta2**step)).sqrt_().add_(self.adam_epsilon)
        return (m / (1 - self.adam_beta1**step)).div_(root)

    def update_together(self, grads, states, params, step):
        m, v = [s["m"] for s in states], [s["v"] for s in states]
        torch._foreach_lerp_(m, grads, 1 - self.adam_beta1)
        torch._foreach_mul_(v, self.adam_beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - self.adam_beta2)
        if not self.bias_correction:
            roots = torch._foreach_sqrt(v)
            torch._foreach_add_(roots, self.adam_epsilon)
            return torch._foreach_div(m, roots)
        roots = torch._foreach_div(v, 1 - self.adam_beta2**step)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.adam_epsilon)
        updates = torch._foreach_div(m, 1 - self.adam_beta1**step)
        torch._foreach_div_(updates, roots)
        return updates

    def seed(self, state, entries, gradients):
        # so that the correction for the zero start gives the means back
        state["m"][entries] = gradients.mean * (1 - self.adam_beta1**gradients.steps)
        state["v"][entries] = gradients.square * (1 - self.adam_beta2**gradients.steps)
        return gradients.steps
