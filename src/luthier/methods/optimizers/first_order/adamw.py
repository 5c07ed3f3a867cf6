"""AdamW: clipping, Adam's rescaling, decoupled weight decay. The default."""

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.adam import Adam
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:1711.05101",
    use_when="nothing speaks against it: it is the default.",
    costs="two fp32 numbers for each trainable parameter.",
    starting_rate="that of the tuner; rates in these pages are AdamW's.",
)
class AdamW(Optimizer):
    """The same as `optim: [clip, adam, weight_decay]`."""

    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator
    # correct both means for their zero start; false: as in BERT's optimizer, whose first steps are larger
    bias_correction: bool = True

    def chain(self):
        adam = Adam(
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            bias_correction=self.bias_correction,
        )
        return Clip(max_grad_norm=self.max_grad_norm), adam, WeightDecay(weight_decay=self.weight_decay)
