"""DP-SGD: differentially private training. The gradient of every row is clipped, and noise is added to their
sum, so that the weights hardly tell whether any one row was among the training data.

With `optim: adamw` this is DP-Adam, with `sgd` DP-SGD: the optimizer comes after the noise. The noise
follows from `target_epsilon`, the length of the run and the share of rows that a step reads; what is spent so
far is in the log (`epsilon`), by Rényi differential privacy with the best order. Departs: the clipped
gradients are computed one row after another, in the memory of a micro-batch of one row, and not by ghost
norms; a tensor is a layer in `clipping: per_layer`, and row_grad_norm is shared out evenly among them.
"""

from __future__ import annotations

from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators.private._private import Private
from luthier.registry import estimator


@estimator(
    paper="arXiv:1607.00133",
    provides=[GRADIENT],
    use_when="rows are private and the weights will leave the house: nobody who reads these can tell with"
    " confidence whether a row was trained on.",
    costs="a forward and backward pass for each row by itself, so steps are slower; memory of a micro-batch"
    " of one row and an fp32 sum of the gradients. Accuracy falls with epsilon; large batches help.",
    starting_rate="that of the optimizer; with adamw often several times larger.",
    example={"noise_multiplier": 0.01, "row_grad_norm": 10.0},
)
class DPSGD(Private):
    """Clipped gradients of rows plus Gaussian noise; (epsilon, delta) by an accountant."""
