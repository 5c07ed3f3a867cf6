"""Stochastic gradient descent: the clipped gradient itself, with optional momentum."""

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.momentum import Momentum
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    use_when="you use `mezo`, compare with theory, or have no memory for any state.",
    costs="no state; with momentum one number for each trainable parameter.",
    starting_rate="no rule: it depends on the gradients' scale, so try powers of ten.",
)
class SGD(Optimizer):
    """The same as `optim: [clip, weight_decay, momentum]`: decay goes through the momentum, as in
    torch.optim.SGD.
    """

    momentum: float = 0.0  # share of the last step that is kept
    nesterov: bool = False  # Nesterov momentum

    def chain(self):
        ball = (Momentum(momentum=self.momentum, nesterov=self.nesterov),) if self.momentum else ()
        return Clip(max_grad_norm=self.max_grad_norm), WeightDecay(weight_decay=self.weight_decay), *ball
