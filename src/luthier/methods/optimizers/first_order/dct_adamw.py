"""DCT-AdamW: AdamW whose state is of low rank, in a few columns of the discrete cosine transform."""

from typing import Annotated

from pydantic import Field

from luthier.methods.optimizers._base import Optimizer
from luthier.methods.transforms.clipping.clip import Clip
from luthier.methods.transforms.projection.dct_adam import DCTAdam
from luthier.methods.transforms.regularization.weight_decay import WeightDecay
from luthier.registry import optimizer


@optimizer(
    paper="arXiv:2505.17967",
    use_when="you tune all weights, AdamW's state does not fit, and galore's decompositions take too long.",
    costs="of a matrix m x n, n the shorter side: 2 m `rank` fp32 numbers; one matrix of cosines for each n.",
    starting_rate="AdamW's.",
)
class DCTAdamW(Optimizer):
    """The same as `optim: [clip, dct_adam, weight_decay]`."""

    rank: Annotated[int, Field(ge=1)] = 128  # columns that are kept
    update_proj_gap: Annotated[int, Field(ge=1)] = 1  # steps between two choices of columns
    error_feedback: bool = False  # add what a step leaves out to the next gradient
    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator

    def chain(self):
        step = DCTAdam(
            rank=self.rank,
            update_proj_gap=self.update_proj_gap,
            error_feedback=self.error_feedback,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
        )
        return Clip(max_grad_norm=self.max_grad_norm), step, WeightDecay(weight_decay=self.weight_decay)
