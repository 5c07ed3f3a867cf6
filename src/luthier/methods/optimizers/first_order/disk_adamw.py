"""Disk AdamW: AdamW whose state lies in files on a disk (Fuyou's optimizer)."""

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.disk_adam import DiskAdam
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2403.06504",
    use_when="you tune all weights with AdamW, and its state does not fit in memory beside them.",
    costs="two fp32 numbers for each trainable parameter on a disk, and the time to read and write them in"
    " every step.",
    starting_rate="AdamW's, to which it is equal.",
)
class DiskAdamW(Optimizer):
    """The same as `optim: [clip, disk_adam, weight_decay]`."""

    folder: str = ""  # an existing folder of the disk that takes the state; empty: that of temporary files
    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator

    def chain(self):
        adam = DiskAdam(
            folder=self.folder,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
        )
        return Clip(max_grad_norm=self.max_grad_norm), adam, WeightDecay(weight_decay=self.weight_decay)
