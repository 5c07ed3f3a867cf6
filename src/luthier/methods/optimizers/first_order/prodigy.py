"""Prodigy: AdamW without a learning rate; the one of the recipe stays at 1."""

import math
from typing import Annotated

from pydantic import Field

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.prodigy import Prodigy as Estimated
from luthier.methods.transforms.clipping.clip import Clip
from luthier.registry import Range, optimizer


@optimizer(
    paper="arXiv:2306.06101",
    use_when="you do not want to search for a learning rate: it estimates one for each parameter group.",
    costs="four fp32 numbers for each trainable parameter.",
    starting_rate="`learning_rate: 1.0`, which multiplies the estimate; a schedule that falls helps.",
)
class Prodigy(Optimizer):
    """The same as `optim: [clip, prodigy]`."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # decay rate of the mean
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999  # decay rate of the mean square
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8  # added to the denominator
    d0: Annotated[float, Field(gt=0)] = 1e-6  # the estimate at first
    # what the estimate is multiplied by
    d_coef: Annotated[float, Field(gt=0), Range(0.5, 2.0, log=True)] = 1.0
    growth_rate: Annotated[float, Field(gt=1)] = math.inf  # what the estimate grows by in a step at most

    def chain(self):
        step = Estimated(
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            d0=self.d0,
            d_coef=self.d_coef,
            growth_rate=self.growth_rate,
            weight_decay=self.weight_decay,
        )
        return Clip(max_grad_norm=self.max_grad_norm), step
