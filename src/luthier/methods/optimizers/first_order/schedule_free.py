"""Schedule-free AdamW: no schedule of the learning rate, and so no number of steps that must be right; the
average of the weights so far is what the run ends with.
"""

from typing import Annotated

from pydantic import Field

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.schedule_free import ScheduleFree as Averaged
from luthier.methods.transforms.clipping.clip import Clip
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2405.15682",
    use_when="you do not know how long a run will be, or want no schedule to choose.",
    costs="two fp32 numbers for each trainable parameter, as AdamW.",
    starting_rate="one to ten times AdamW's, with `lr_scheduler_type: constant_with_warmup`.",
)
class ScheduleFree(Optimizer):
    """The same as `optim: [clip, schedule_free]`."""

    # how far gradients are taken toward the average, which takes the place of momentum
    adam_beta1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999  # decay rate of the mean square
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8  # added to the denominator

    def chain(self):
        step = Averaged(
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            weight_decay=self.weight_decay,
        )
        return Clip(max_grad_norm=self.max_grad_norm), step
