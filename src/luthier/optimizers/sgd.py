"""Stochastic gradient descent: the clipped gradient itself, with momentum where it is asked for."""

from luthier.method import optimizer
from luthier.optimizers._optimizer import Optimizer
from luthier.transforms.clip import Clip
from luthier.transforms.momentum import Momentum
from luthier.transforms.weight_decay import WeightDecay


@optimizer()
class SGD(Optimizer):
    """The same as `transforms: [clip, weight_decay, momentum]`: decay goes through the momentum, as in torch.optim.SGD."""

    momentum: float = 0.0  # share of the last step that goes on
    nesterov: bool = False  # look ahead along the momentum

    def chain(self):
        ball = (Momentum(momentum=self.momentum, nesterov=self.nesterov),) if self.momentum else ()
        return Clip(max_grad_norm=self.max_grad_norm), WeightDecay(weight_decay=self.weight_decay), *ball
