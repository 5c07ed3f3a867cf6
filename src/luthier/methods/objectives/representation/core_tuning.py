"""Core-tuning: a contrastive loss on features of the same class with hard pairs weighted up, plus mixed
features for the classifier.

Use it beside the main loss, for classes that are answered in words or by a head: `sft + core_tuning`. A row's
feature is the hidden state that predicts the first token of its answer. For each row a hard positive is mixed
from the least similar row of its class and the most similar one of another, and a semi-hard negative from the
row itself and any other row (one of its own class makes it a positive, as mixed labels do in the authors'
code); pairs with a low probability get more weight (focal), and the model's own output
layer is trained on the mixed features with mixed labels. With `eta` and `boundary` 0 this is plain
fine-tuning. Departs by default: features are compared directly and by rows, each with its own two mixtures.
`projected: true` adds the paper's two layers (role `projection`), and `pool: all` compares all rows and
mixtures of a micro-batch with each other, those with equal mixed labels being alike, as in the authors' code.
Mixing concerns the first token of an answer.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.representation._features import answered, classes, features
from luthier.methods.roles.networks.projection import PROJECTION
from luthier.model.outputs import Outputs
from luthier.registry import Range, objective

NotNegative = Annotated[float, Field(ge=0)]
INSIDE = (
    "pairs are formed within a micro-batch; set per_device_train_batch_size high enough for"
    " several rows of each class"
)


@objective(
    paper="arXiv:2102.06605",
    row="core-tuning",
    requires=[COMPLETIONS, HIDDEN],
    contract={"accumulation": INSIDE},
    use_when="you fine-tune a classifier on few rows and want features of one class to be near each"
    " other: add it to `sft`.",
    costs="compares each row with all of its micro-batch; no further forward pass through the network.",
    starting_rate="that of `sft`.",
    covers="the focal contrast, hard positives and semi-hard negatives, boundary smoothing, a projection head"
    " and the comparison of all mixtures, on features of text.",
    omits="images.",
    tests=[
        "methods/objectives/representation/test_core_tuning.py::test_contrast_is_supcon_where_every_pair_weighs"
        "_alike",
        "methods/objectives/representation/test_core_tuning.py::test_core_tuning_without_weights_is_plain_tuning",
        "methods/objectives/representation/test_core_tuning.py::test_all_mixtures_are_compared_by_their_labels",
        "methods/objectives/representation/test_core_tuning.py::test_a_projection_head_trains_along",
        "methods/objectives/representation/test_core_tuning.py::test_core_tuning_draws_classes_together",
    ],
)
class CoreTuning(Objective):
    """eta * focal contrast + boundary * cross-entropy of the mixed features. Rows without a row of another
    class have no loss.
    """

    unit = "sequence"

    eta: Annotated[NotNegative, Range(0.1, 10, log=True)] = 1.0  # weight of the contrastive loss
    boundary: NotNegative = 1.0  # weight of the mixed features' cross-entropy
    # temperature of the contrastive loss (0.07 in the paper, behind two more layers)
    temperature: Annotated[float, Field(gt=0), Range(0.05, 1.0, log=True)] = 0.5
    alpha: Annotated[float, Field(gt=0)] = 1.0  # mixing shares are drawn from Beta(alpha, alpha)
    mixing: bool = True  # false: no mixed features
    focal: bool = True  # false: every pair has the same weight (SupCon)
    # own: each row is compared with the rows and its own two mixtures; all: also with those of other rows,
    # and a hard mixture is then a positive of none of them
    pool: Literal["own", "all"] = "own"
    projected: bool = False  # compare features behind two trained layers (role `projection`)

    @property
    def active_requires(self):
        return self.requires | {PROJECTION} if self.projected else self.requires

    def count(self, batch):
        return len(answered(batch))

    def rows_of_units(self, batch):
        return batch.group[answered(batch)]

    def loss(self, roles, batch):
        out, kinds = roles.policy.outputs(batch), classes(batch)
        h, tokens = features(batch, out), batch.labels[batch.targets][batch.place == 0]
        own = torch.eye(len(h), dtype=torch.bool, device=h.device)
        same = (kinds[:, None] == kinds) & ~own
        other = kinds[:, None] != kinds
        paired = other.any(1)
        if not paired.any():
            return 0 * h.sum(1)
        z = F.normalize(h, dim=1)
        near = (z @ z.T).detach()
        share, order = (
            torch.tensor(x, device=h.device) for x in zip(*draws(batch, roles.clock, self.alpha), strict=True)
        )
        lam, mu = share.float()[:, None], share.float().clamp(min=0.8)[:, None]
        liked = same | own & ~same.any(1, keepdim=True)  # who is alone of a class has itself
        like = near.masked_fill(~liked, torch.inf).argmin(1)  # the least similar of its class
        unlike = near.masked_fill(~other, -torch.inf).argmax(1)  # the most similar of another
        turn = order.argsort()
        any_other = torch.empty_like(turn)
        any_other[turn] = turn.roll(1)  # the next in a random round, wherever in the batch a row stands
        hard, semi = lam * h[like] + (1 - lam) * h[unlike], (1 - mu) * h + mu * h[any_other]

        project = roles.projection if self.projected else nn.Identity()
        z, z_hard, z_semi = (F.normalize(project(x), dim=1) for x in (h, hard, semi))
        # a mixture of two rows of one class is of that class, and no negative
        pure = kinds == kinds[any_other]
        if self.mixing and self.pool == "all":
            value = self.eta * self.all_pairs(torch.cat([z, z_hard, z_semi]), mixed_labels(kinds, pure))
        else:
            scores, positive = [(z @ z.T).masked_fill(own, -torch.inf)], [same]
            if self.mixing:
                scores += [(z * x).sum(1, keepdim=True) for x in (z_hard, z_semi)]
                positive += [torch.ones_like(paired)[:, None], pure[:, None]]
            scores, positive = torch.cat(scores, 1), torch.cat(positive, 1)
            value = self.eta * contrast(scores / self.temperature, positive, self.focal)
        if self.mixing and self.boundary:
            mixed = [(hard, lam, like, unlike), (semi, mu, any_other, torch.arange(len(h), device=h.device))]
            value = (
                value
                + self.boundary
                * sum(soft_cross_entropy(out, x, s, tokens[a], tokens[b]) for x, s, a, b in mixed)
                / 2
            )
        return torch.where(paired, value, 0 * value.detach())

    def all_pairs(self, z: Tensor, labels: Tensor) -> Tensor:
        """[3N, d] rows, hard and semi-hard mixtures, and their labels [3N] -> [N] the contrast of each row's
        three features, the mean over those that something else is alike to.
        """
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        alike = (labels[:, None] == labels) & ~own
        scores = (z @ z.T / self.temperature).masked_fill(own, -torch.inf)
        values = contrast(scores, alike, self.focal).view(3, -1)
        anchors = alike.any(1).view(3, -1).sum(0)
        return values.sum(0) / anchors.clamp(min=1)


def mixed_labels(kinds: Tensor, pure: Tensor) -> Tensor:
    """[N] classes, and which semi-hard mixtures are of one class -> [3N] a number for the label of each row,
    of each hard and of each semi-hard mixture; labels mixed of two classes are like no other.
    """
    classes, kind = kinds.unique(return_inverse=True)
    alone = len(classes) + torch.arange(2 * len(kinds), device=kinds.device)
    hard, semi = alone.view(2, -1)
    return torch.cat([kind, hard, torch.where(pure, kind, semi)])


def contrast(scores: Tensor, positive: Tensor, focal: bool) -> Tensor:
    """[N, M] scores of pairs and which of them are of one class -> [N] the mean of -(1 - p) log p over these;
    focal false: of -log p.
    """
    logp = scores.log_softmax(1).masked_fill(~positive, 0.0)
    weight = 1 - logp.exp() if focal else 1.0
    return -(weight * logp * positive).sum(1) / positive.sum(1).clamp(min=1)


def soft_cross_entropy(out: Outputs, x: Tensor, share: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[N, d] features -> [N] what the output layer pays for answering `first` with a share of the label and
    `second` with the rest.
    """
    outputs = Outputs(x.to(out.hidden.dtype), out.head, first, out.role_context)
    logp = outputs.at(torch.stack([first, second], 1))
    return -(share[:, 0] * logp[:, 0] + (1 - share[:, 0]) * logp[:, 1])


def draws(batch, clock, alpha: float) -> list[tuple[float, float]]:
    """For each answered sequence a share and a place in the round, by its row and the seed alone."""
    counts: dict[str, int] = {}
    out = []
    for g in batch.group[answered(batch)].tolist():
        name = str(batch.rows[g]["id"])
        counts[name] = counts.get(name, -1) + 1
        rng = np.random.default_rng(clock.derive_seed("core_tuning", name, counts[name]))
        out.append((float(rng.beta(alpha, alpha)), float(rng.random())))
    return out
