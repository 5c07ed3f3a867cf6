"""Lion with clipping and decoupled weight decay. Needs a learning rate 3 to 10 times smaller than AdamW's."""

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.lion import Lion as Sign
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2302.06675",
    row="lion",
    use_when="the optimizer's state is what does not fit, and you can lower the learning rate.",
    costs="one fp32 number for each trainable parameter.",
    starting_rate="a third to a tenth of AdamW's.",
    rate_factor=0.2,
    covers="with clipping and decoupled decay, of matrices alone.",
    tests=[
        "methods/optimizers/first_order/test_lion.py::test_lion_by_its_closed_form",
    ],
)
class Lion(Optimizer):
    """The same as `optim: [clip, lion, weight_decay]`."""

    beta1: float = 0.9  # share of the old momentum in the step
    beta2: float = 0.99  # decay rate of the momentum

    def chain(self):
        sign = Sign(beta1=self.beta1, beta2=self.beta2)
        return Clip(max_grad_norm=self.max_grad_norm), sign, WeightDecay(weight_decay=self.weight_decay)
