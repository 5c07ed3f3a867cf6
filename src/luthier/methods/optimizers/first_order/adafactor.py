"""Adafactor with clipping and decoupled weight decay: one number a row and a column for squares."""

from typing import Annotated

from pydantic import Field

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.adaptive.adafactor import Adafactor as Factored
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:1804.04235",
    use_when="you tune all weights and AdamW's state does not fit; T5 and its kin were trained with it.",
    costs="one fp32 number for each row and each column of a matrix, and for each number of a vector.",
    starting_rate="AdamW's; with `scale_parameter` about 1e-2.",
)
class Adafactor(Optimizer):
    """The same as `optim: [clip, adafactor, weight_decay]`."""

    # the rate of the running means at a step is step to this power
    decay_rate: Annotated[float, Field(lt=0, ge=-1)] = -0.8
    clip_threshold: Annotated[float, Field(gt=0)] = 1.0  # largest root mean square of a tensor's update
    scale_parameter: bool = False  # multiply the step by the tensor's root mean square

    def chain(self):
        step = Factored(
            decay_rate=self.decay_rate,
            clip_threshold=self.clip_threshold,
            scale_parameter=self.scale_parameter,
        )
        return Clip(max_grad_norm=self.max_grad_norm), step, WeightDecay(weight_decay=self.weight_decay)
