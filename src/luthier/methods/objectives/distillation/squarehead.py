"""SquareHead: the squared error between the hidden states of the policy and of its dense teacher at every
layer, normalised by the teacher's norm.

For fine-tuning a pruned model, beside the loss on rows and optionally `distill`: `squarehead + sft` (as the
first term it shares that loss's forward pass). The teacher is the model before pruning: `roles: {teacher:
initial}` with tuner `pruned`. Departs: the error is normalised at each supervised position instead of over
all tokens of a batch, so that it does not depend on how a batch is split and a few tokens with very large
states do not dominate; prompt tokens are left out.
"""

import torch

from luthier.errors import RecipeError
from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.roles._base import TEACHER
from luthier.registry import objective


@objective(
    paper="arXiv:2310.06927",
    row="squarehead",
    requires=[COMPLETIONS, TEACHER, HIDDEN],
    contract={"head": "it compares hidden states below the head; train the head with a loss beside it"},
    use_when="a pruned model is to recover by following its dense parent layer by layer: add it to `sft`.",
    starting_rate="that of `sft`.",
    covers="the loss on hidden states by the teacher's size; zeros of a pruned network stay (tuner"
    " `pruned`).",
    omits="sparse inference.",
    tests=[
        "methods/objectives/distillation/test_squarehead.py::test_squarehead_measures_by_the_teachers_size",
        "methods/objectives/distillation/test_squarehead.py::test_zeros_stay_while_all_else_moves",
        "methods/objectives/distillation/test_squarehead.py::test_squarehead_heals_what_pruning_broke",
    ],
)
class SquareHead(Objective):
    """Sum over layers of |teacher - policy|^2 / |teacher|^2."""

    def loss(self, roles, batch):
        ours, theirs = roles.policy.layers(batch), roles.teacher.layers(batch)
        if len(ours) != len(theirs):
            raise RecipeError(
                f"squarehead compares the models layer by layer, but the policy has {len(ours)}"
                f" layers and the teacher {len(theirs)}"
            )
        pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
        each = [(b - a).square().sum(1) / b.square().sum(1).clamp(min=1e-12) for a, b in pairs]
        each = torch.stack(each)
        batch.note(layer_error=each.mean(0))
        return each.sum(0)
