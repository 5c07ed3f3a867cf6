"""LOOK: a soft k-nearest-neighbour loss; a row should share its class with most of its nearest neighbours,
not with all rows of its class.

A soft vote of the k nearest features in a memory, without the row itself; distant rows of the same class have
no influence, so a class may form several clusters. Made for images and their labels: here a row's feature is
the hidden state that predicts the first token of its answer, and its class is the answer (for a classifier,
the features are its logits). Neighbours are features of the teacher, the policy's running average
(`mean_teacher`), as in the paper's momentum encoder.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.representation._features import answered, classes, features, of_rows
from luthier.methods.roles._base import TEACHER
from luthier.methods.roles.features.memory import MEMORY
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2110.06014",
    row="look-supervised-pretraining",
    requires=[COMPLETIONS, TEACHER, MEMORY, HIDDEN],
    contract={"head": "it uses features below the head; train the head with a loss beside it"},
    use_when="classes are spread over several clusters, so that pulling a whole class together would"
    " hurt; it needs labelled rows.",
    costs="a memory of features.",
    starting_rate="that of `sft`.",
    covers="the soft vote of nearest neighbours as a loss.",
    omits="images.",
    tests=[
        "methods/objectives/representation/test_look.py"
        "::test_look_is_the_soft_vote_of_nearest_neighbours_without_oneself",
        "methods/objectives/representation/test_look.py::test_look_keeps_what_a_class_is_made_of",
    ],
)
class Look(Objective):
    """-log of the share of votes that a row's own class has among its k nearest neighbours."""

    unit = "sequence"

    k: Annotated[int, Field(ge=1), Range(10, 400, log=True)] = 200  # number of neighbours that vote
    # temperature of the vote: the lower, the more the nearest count
    temperature: Annotated[float, Field(gt=0), Range(0.03, 0.3, log=True)] = 0.1

    def count(self, batch):
        return len(answered(batch))

    def rows_of_units(self, batch):
        return batch.group[answered(batch)]

    def loss(self, roles, batch):
        memory, kinds, rows = roles.memory, classes(batch), of_rows(batch)
        memory.remember(rows, kinds, features(batch, roles.teacher.outputs(batch)))
        n = memory.count
        near = (
            F.normalize(features(batch, roles.policy.outputs(batch)), dim=1)
            @ F.normalize(memory.features[:n], dim=1).T
        )
        itself, same = rows[:, None] == memory.rows[:n], kinds[:, None] == memory.classes[:n]
        votes, remembered = vote(near / self.temperature, itself, same, self.k)
        batch.note(neighbours_agree=votes.exp())
        return near.new_zeros(len(near)).masked_scatter(remembered, -votes)


def vote(near: Tensor, itself: Tensor, same: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[N, M] nearness, which entries are the row itself, which are of its class -> log share of its class
    among its k nearest, of the rows [N] whose class is remembered at all, and which these are. The nearest of
    its class always has a vote.
    """
    same = same & ~itself
    remembered = same.any(1)
    near, itself, same = (
        near[remembered].masked_fill(itself[remembered], -torch.inf),
        itself[remembered],
        same[remembered],
    )
    voting = torch.zeros_like(same).scatter(1, near.topk(min(k, near.shape[1]), 1).indices, True)
    if len(near):
        voting = (
            voting.scatter(1, near.masked_fill(~same, -torch.inf).argmax(1, keepdim=True), True) & ~itself
        )
    own, every = (near.masked_fill(~x, -torch.inf).logsumexp(1) for x in (voting & same, voting))
    return own - every, remembered
