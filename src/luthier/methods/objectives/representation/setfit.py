"""SetFit's pair loss: rows of one class are drawn to a cosine of 1 and rows of different classes to 0, so
that few labelled rows become many pairs.

A row's feature is the hidden state that predicts the first token of its answer, its class is the answer (of a
classifier the features are its logits). Every row of a micro-batch is paired with all others: half of its
loss is the mean of (1 - cos)^2 over rows of its class, half the mean of cos^2 over rows of other classes, as
SetFit draws as many pairs of each kind. It is the first stage of FM3, whose second stage trains tuner
`hyper_adapter` with heads on the network that this one leaves: `init_from` its folder. Departs: pairs are
those of a micro-batch, drawn anew at each step, not a list drawn once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.representation._features import answered, classes, features
from luthier.registry import objective


@objective(
    paper="arXiv:2209.11055",
    row="fm3",
    requires=[COMPLETIONS, HIDDEN],
    contract={
        "accumulation": "pairs are formed within a micro-batch; set per_device_train_batch_size high enough"
        " for several rows of each class",
        "head": "it uses features below the head; train the head with a loss beside it, or after it",
    },
    use_when="there are a few labelled rows of each class: features that lie by class are learned from their"
    " pairs, before a head is trained on them or beside `sft`.",
    costs="compares each row with all of its micro-batch; no further forward pass.",
    starting_rate="that of `sft`.",
    covers="FM3's first stage: positive and negative pairs of few rows, the squared error of their cosines.",
    omits="pairs of an image and a text; sentence encoders with pooled features.",
    tests=[
        "methods/objectives/representation/test_setfit.py::test_the_loss_is_the_squared_errors_of_cosines",
        "methods/objectives/representation/test_setfit.py::test_cosines_of_rows_held_out_part_by_class",
    ],
)
class SetFit(Objective):
    """Half the mean of (1 - cos)^2 over a row's positives and half that of cos^2 over its negatives."""

    unit = "sequence"

    def count(self, batch):
        return len(answered(batch))

    def rows_of_units(self, batch):
        return batch.group[answered(batch)]

    def loss(self, roles, batch):
        z = F.normalize(features(batch, roles.policy.outputs(batch)), dim=1)
        return pair_losses(z @ z.T, classes(batch))


def pair_losses(cosines: Tensor, kinds: Tensor) -> Tensor:
    """[n, n] cosines of rows, [n] their classes -> [n] the loss of each row's pairs."""
    own = torch.eye(len(kinds), dtype=torch.bool, device=kinds.device)
    same = kinds[:, None] == kinds
    positive = mean_where((1 - cosines).square(), same & ~own)
    negative = mean_where(cosines.square(), ~same)
    return (positive + negative) / 2


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """[n, n] -> [n] the mean of the chosen values of each row; 0 where there are none."""
    return (values * chosen).sum(1) / chosen.sum(1).clamp(min=1)
