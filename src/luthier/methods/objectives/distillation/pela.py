"""PELA's recovery phase: trains a low-rank model to reproduce the full model's hidden states at every layer,
before fine-tuning on a task.

Use it as a term beside the loss on rows (`pela + sft`; as the first term it shares that loss's forward pass),
with tuner `pela`, whose factored matrices can also be kept within `eps` of the original weights. The teacher
is the full model: `roles: {teacher: base}`. Departs: features are compared at supervised positions only.
"""

from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import HIDDEN, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.roles._base import TEACHER
from luthier.registry import objective

NotNegative = Annotated[float, Field(ge=0)]


@objective(
    paper="arXiv:2310.10700",
    row="pela",
    requires=[COMPLETIONS, TEACHER, HIDDEN, TOPK],
    contract={"head": "it compares features below the head; train the head with a loss beside it"},
    use_when="tuner `pela` has replaced matrices by narrow products and the model must be recovered"
    " before it learns a task.",
    starting_rate="that of `sft`.",
    covers="the regularised distillation of a low-rank model (tuner `pela` makes it).",
    tests=[
        "methods/objectives/distillation/test_pela.py::test_products_are_the_best_of_their_rank",
        "methods/objectives/distillation/test_pela.py::test_healing_brings_a_model_of_low_rank_back",
    ],
)
class PELA(Objective):
    """feature * mean over layers of the states' mean squared error + distillation * KL + perturbation * (||BA
    - W|| - eps)^2.
    """

    feature: NotNegative = 1.0  # weight of the error of the hidden states
    distillation: NotNegative = 0.0  # weight of KL(teacher || policy) on the answers
    # weight of the distance of each product from its weight beyond eps, mean over matrices; for tuner pela
    perturbation: NotNegative = 0.0
    eps: NotNegative = 1e-3  # the largest sum of a row of |BA - W| without a penalty

    def loss(self, roles, batch):
        ours, theirs = roles.policy.layers(batch), roles.teacher.layers(batch)
        if len(ours) != len(theirs):
            raise RecipeError(
                f"pela compares the models layer by layer, but the policy has {len(ours)}"
                f" layers and the teacher {len(theirs)}"
            )
        value = self.feature * torch.stack(
            [(b.float() - a.float()).square().mean(1) for a, b in zip(ours, theirs, strict=True)]
        ).mean(0)
        if self.distillation:
            kl = lambda z, t: divergence(t.log_softmax(-1), z.log_softmax(-1))
            value = value + self.distillation * roles.policy.outputs(batch).apply(
                kl, beside=[roles.teacher.outputs(batch)]
            )
        if self.perturbation:
            drift = getattr(roles.tuner, "drift", None)
            if drift is None:
                raise RecipeError(
                    "pela: perturbation needs the factored matrices of tuner 'pela'; set it to"
                    " 0 with other tuners"
                )
            value = value + self.perturbation * torch.stack([excess(gap, self.eps) for gap in drift()]).mean()
        return value


def excess(gap: torch.Tensor, eps: float) -> torch.Tensor:
    """(the largest sum of a row of |gap| - eps)^2."""
    return (gap.abs().sum(1).max() - eps).square()
