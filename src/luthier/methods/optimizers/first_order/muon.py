"""Muon with clipping and decoupled weight decay; vectors, embeddings and head by Adam."""

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.adam import Adam
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.projection.muon import Muon as Orthogonal
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2502.16982",
    use_when="you tune whole matrices and want fewer steps than AdamW takes, at half of its state.",
    costs="one fp32 number for each weight of a matrix in a layer, two for all others.",
    starting_rate="AdamW's, whose size its updates have.",
)
class Muon(Optimizer):
    """The same as `optim: [clip, muon, weight_decay]`."""

    muon_momentum: float = 0.95  # share of the old momentum
    nesterov: bool = True  # Nesterov momentum
    adam_beta1: float = 0.9  # Adam's decay rate of the mean, for what is no matrix in a layer
    adam_beta2: float = 0.999  # its decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to its denominator

    def chain(self):
        adam = Adam(adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2, adam_epsilon=self.adam_epsilon)
        step = Orthogonal(muon_momentum=self.muon_momentum, nesterov=self.nesterov, inner=(adam,))
        return Clip(max_grad_norm=self.max_grad_norm), step, WeightDecay(weight_decay=self.weight_decay)
