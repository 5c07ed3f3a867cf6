"""Sophia with clipping and decoupled weight decay, for `estimator: gauss_newton`."""

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.sophia import Sophia as Step
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2305.14342",
    use_when="a language model trains long and curvature differs much among its weights; set `estimator:"
    " gauss_newton` beside it, without which it is the momentum's sign.",
    costs="two fp32 numbers for each trainable parameter.",
    starting_rate="that of `lion`, up to AdamW's.",
    rate_factor=0.3,
    covers="with clipping and decoupled decay, of matrices alone.",
    omits="Hutchinson's estimate, which takes second derivatives; the paper's pretraining runs.",
    tests=["methods/optimizers/first_order/test_sophia.py::test_the_step_by_hand"],
)
class Sophia(Optimizer):
    """The same as `optim: [clip, sophia, weight_decay]`."""

    beta1: float = 0.96  # decay rate of the momentum
    gamma: float = 0.05  # scale of the curvature: the smaller, the more numbers take a whole step

    def chain(self):
        step = Step(beta1=self.beta1, gamma=self.gamma)
        return Clip(max_grad_norm=self.max_grad_norm), step, WeightDecay(weight_decay=self.weight_decay)
