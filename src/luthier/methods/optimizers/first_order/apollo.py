"""APOLLO with clipping and decoupled weight decay: AdamW's scales from a random projection of few rows."""

from typing import Annotated, Literal

from pydantic import Field

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.projection.apollo import Apollo as Scaled
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2412.05270",
    use_when="you tune all weights and AdamW's state does not fit: its memory is near SGD's.",
    costs="2 n `rank` fp32 numbers for a matrix of m x n, n the longer side; no decomposition.",
    starting_rate="AdamW's.",
)
class Apollo(Optimizer):
    """The same as `optim: [clip, apollo, weight_decay]`. APOLLO-Mini: rank 1, tensor, 128."""

    rank: Annotated[int, Field(ge=1)] = 256  # rows of the projection
    update_proj_gap: Annotated[int, Field(ge=1)] = 200  # steps between two draws of it
    scale_type: Literal["channel", "tensor"] = "channel"  # a number for each column, or one for the matrix
    scale: Annotated[float, Field(gt=0)] = 1.0  # what updates are multiplied by
    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator

    def chain(self):
        step = Scaled(
            rank=self.rank,
            update_proj_gap=self.update_proj_gap,
            scale_type=self.scale_type,
            scale=self.scale,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
        )
        return Clip(max_grad_norm=self.max_grad_norm), step, WeightDecay(weight_decay=self.weight_decay)
