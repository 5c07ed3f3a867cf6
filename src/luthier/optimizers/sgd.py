"""Stochastic gradient descent: the clipped gradient itself."""
from luthier.method import optimizer
from luthier.optimizers._optimizer import Optimizer
from luthier.transforms.clip import Clip
from luthier.transforms.weight_decay import WeightDecay


@optimizer()
class SGD(Optimizer):
    """The same as `transforms: [clip, weight_decay]`."""

    def chain(self):
        return Clip(max_grad_norm=self.max_grad_norm), WeightDecay(weight_decay=self.weight_decay)
