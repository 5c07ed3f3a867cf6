"""DR-Tune: regularises the output layer by also classifying the pretrained model's features, aligned with the
tuned ones.

A row's feature is the hidden state that predicts the first token of its answer. A memory holds features of
both models (`roles: {feature_pairs: feature_pairs}`); the rotation that best maps one to the other, and a
shift per class, align a row's pretrained feature with the tuned model's, and the output layer is trained to
predict the row's answer from it. The layers below get no gradient from this term; the output layer itself
must be trainable: `tuner: full`, or `modules_to_save: [lm_head]` with LoRA. Departs: made for images; the
memory only determines the alignment, and the loss is on the batch's own rows, so that it does not depend on
how a batch is split. The rotation is fitted at each step.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import HIDDEN, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.representation._features import features, of_rows
from luthier.methods.roles._base import REFERENCE, REFERENCE_OUTPUTS
from luthier.methods.roles.features.feature_pairs import FEATURE_PAIRS
from luthier.model.outputs import Outputs
from luthier.registry import objective


@objective(
    paper="arXiv:2308.12058",
    row="dr-tune",
    requires=[COMPLETIONS, REFERENCE, FEATURE_PAIRS, LOGPROBS, HIDDEN, REFERENCE_OUTPUTS],
    use_when="you fine-tune a classifier and want its output layer to stay consistent with the"
    " pretrained features, against overfitting on few rows.",
    costs="a memory of feature pairs, and a rotation fitted at each step.",
    starting_rate="that of `sft`.",
    covers="the regularisation of the head by pretrained features, calibrated by a rotation.",
    omits="images.",
    tests=[
        "methods/objectives/representation/test_dr_tune.py::test_a_known_rotation_is_found_and_undone",
        "methods/objectives/representation/test_dr_tune.py"
        "::test_the_pretrained_features_teach_the_output_layer_alone",
    ],
)
class DRTune(Objective):
    """-log p of each token; for the first token of an answer, plus `weight` * -log p from the aligned
    pretrained feature.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0  # weight of the pretrained features' loss; 0: plain SFT

    def loss(self, roles, batch):
        out = roles.policy.outputs(batch)
        value = -out.logprobs
        if not self.weight:
            return value
        first = batch.place == 0
        tokens, memory = batch.labels[batch.targets][first], roles.feature_pairs
        before, after = (
            features(batch, roles.reference.outputs(batch)).detach(),
            features(batch, out).detach(),
        )
        memory.remember(of_rows(batch), tokens, torch.cat([before, after], 1))
        pre, down = memory.features[: memory.count].chunk(2, 1)
        table = roles.policy.model.get_output_embeddings()
        moved = calibrated(
            before,
            tokens,
            pre,
            down,
            memory.classes[: memory.count],
            None if table is None else table.weight.detach().float(),
        )
        judged = Outputs(moved.to(out.hidden.dtype), out.head, tokens, out.role_context)
        again = -judged.at(tokens[:, None])[:, 0]
        batch.note(pretrained=again.detach())
        return value + self.weight * torch.zeros_like(value).masked_scatter(first, again)


def calibrated(
    x: Tensor, kinds: Tensor, pre: Tensor, down: Tensor, memory_kinds: Tensor, table: Tensor | None
) -> Tensor:
    """Pretrained features x [N, d] of classes [N] -> where the tuned network has them, by pairs pre, down [M,
    d] of classes [M].

    table: [V, d] the output layer's rows, whose nearness to a feature is the weight it has in its class's
    centre; None: all alike.
    """
    if len(pre) < 2:
        return x
    a, b = F.normalize(pre, dim=1), F.normalize(down, dim=1)
    R = rotation(a, b)
    turned, out = a @ R, F.normalize(x, dim=1) @ R
    for c in kinds.unique():
        mine = memory_kinds == c
        if mine.any():
            sure = (
                torch.ones(int(mine.sum()), device=x.device)
                if table is None
                else F.normalize(table[c], dim=0) @ b[mine].T
            )
            centre = sure.softmax(0) @ b[mine]
            out = torch.where((kinds == c)[:, None], out + centre - turned[mine].mean(0), out)
    return F.normalize(out, dim=1) * down.norm(dim=1).mean()


def rotation(a: Tensor, b: Tensor) -> Tensor:
    """[d, d], determinant 1: the rotation R for which centred a R lies nearest to centred b (Kabsch)."""
    U, _, V = torch.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
    turn = torch.ones(len(U), device=a.device)
    turn[-1] = torch.det(U @ V).sign()
    return (U * turn) @ V
