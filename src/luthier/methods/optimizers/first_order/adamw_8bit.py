"""AdamW whose moments are stored in one byte a number (8-bit Adam)."""

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.adam_8bit import Adam8bit
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2110.02861",
    use_when="you tune all weights with AdamW, and a quarter of its state is what fits.",
    costs="two bytes for each trainable parameter, and some time for rounding.",
    starting_rate="AdamW's.",
)
class AdamW8bit(Optimizer):
    """The same as `optim: [clip, adam_8bit, weight_decay]`."""

    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator

    def chain(self):
        adam = Adam8bit(
            adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2, adam_epsilon=self.adam_epsilon
        )
        return Clip(max_grad_norm=self.max_grad_norm), adam, WeightDecay(weight_decay=self.weight_decay)
