"""OGEN: regularises fine-tuning on some classes by generated features of unseen classes, with a teacher that
averages recent snapshots.

Use it beside the loss on real rows: `sft + ogen`. Each known class in turn is treated as unknown, so that the
generator learns to predict its features from those of similar classes; generated features of known and
unknown classes are then classified by the model's own output layer, and on the unknown ones the policy is
kept near the average of its recent snapshots (`roles: {teacher: snapshot_average, generator: {...}}`). With
all weights 0 this is plain fine-tuning.

Departs: made for CLIP, whose image features and class texts correspond here to the hidden state that predicts
an answer's first token and to the output layer's row for the class name. Hidden states change as the model is
tuned, so the gradient of generated features reaches it through V (in the paper, through the class texts), and
the class statistics follow.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import HIDDEN, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.objectives.preference._pairs import Probability
from luthier.methods.objectives.representation._features import answered, features, of_rows
from luthier.methods.roles._base import TEACHER
from luthier.methods.roles.features.generator import GENERATOR
from luthier.model.outputs import Outputs
from luthier.registry import objective

Weight = Annotated[float, Field(ge=0)]
NOTED = {"base_classes": "known", "new_classes": "unknown"}  # terms -> names of their training metrics


@objective(
    paper="arXiv:2401.15914",
    row="ogen",
    requires=[COMPLETIONS, TEACHER, GENERATOR, HIDDEN, TOPK],
    former_settings={"known": "base_classes", "unknown": "new_classes"},
    use_when="you tune a classifier on some classes and must not lose classes that no row has.",
    costs="a small generator that is trained along; its teacher keeps several snapshots of the"
    " trainable parameters.",
    starting_rate="that of `sft`.",
    covers="features of unknown classes from known ones, and the adaptive self-distillation beside them.",
    omits="images.",
    tests=[
        "methods/objectives/representation/test_ogen.py::test_ogen_keeps_classes_that_are_not_tuned_on",
        "methods/objectives/representation/test_ogen.py::test_ogen_without_weights_is_nothing_and_warms_up",
    ],
)
class OGEN(Objective):
    """Reconstruction + cross-entropy of generated features of known and unknown classes + distillation on
    them.
    """

    unit = "sequence"

    reconstruction: Weight = 1.0  # weight of the squared distance of generated features from real ones
    # weight of the cross-entropy of generated features of the row's class, and of its neighbours'
    base_classes: Weight = 0.25
    new_classes: Weight = 0.5  # weight of the cross-entropy of generated features of unknown classes
    distillation: Weight = 1.0  # weight of KL(teacher || policy) on generated features of unknown classes
    warmup: Probability = 0.2  # share of the run before generated features are classified

    def count(self, batch):
        return len(answered(batch))

    def rows_of_units(self, batch):
        return batch.group[answered(batch)]

    def loss(self, roles, batch):
        make, out, late = roles.generator, roles.policy.outputs(batch), roles.teacher.outputs(batch)
        h = features(batch, out)
        kinds, here = make.kind(batch.labels[batch.targets][batch.place == 0])
        table = roles.policy.model.get_output_embeddings().weight
        if h.shape[1] != table.shape[1] or table.shape[1] != make.mean.shape[1]:
            raise RecipeError(
                f"ogen: hidden states have width {h.shape[1]}, the output layer"
                f" {table.shape[1]} and the generator {make.mean.shape[1]}; they must be equal"
            )
        y, z = kinds[here], F.normalize(h[here], dim=1)
        if not len(y):
            return h.new_zeros(len(h))
        make.remember(of_rows(batch)[here], y, h[here])

        c = len(make.base_classes)
        texts = F.normalize(table.detach()[make.tokens].float(), dim=1)
        old, new, near = texts[:c], texts[c:], make.neighbours()[y]  # near: [n, k]
        k = min(make.k, len(new))
        far_classes = (old[y] @ new.T).topk(k, 1).indices  # [n, k'] the unknown classes nearest to the row's
        noise = torch.rand(z.shape[1], generator=roles.clock.rng("ogen")).to(z.device)
        sampled = (make.mean + noise * make.spread())[near]
        own = old[y][:, None]

        alone = make(own, old[near], sampled)[:, 0]  # [n, d] the row's class from its neighbours
        # [n, k, d] the neighbours from the row
        others, others_still = (make(old[near], own, x[:, None]) for x in (z, z.detach()))
        unheard = make(new[far_classes], own, z[:, None])  # [n, k', d]
        with torch.no_grad():
            unheard_late = make(
                new[far_classes], own, F.normalize(features(batch, late)[here], dim=1)[:, None]
            )

        def judged(x: Tensor, by: Outputs, ids: Tensor) -> Tensor:
            """[..., d] states of length one -> [..., classes] log-probabilities among these classes."""
            flat = (x * make.size).flatten(0, -2).to(by.hidden.dtype)
            outputs = Outputs(flat, by.head, ids.new_zeros(len(flat)), by.role_context)
            return outputs.apply(lambda logits: logits[:, ids].float().log_softmax(-1)).view(
                *x.shape[:-1], len(ids)
            )

        first, last = make.tokens[:c], make.tokens[c:]
        says = judged(unheard, out, last)
        terms = {
            "reconstruction": (
                (alone - z.detach()).square().sum(1) + (others_still - sampled).square().sum(2).mean(1)
            ),
            "distillation": divergence(judged(unheard_late, late, last).detach(), says).mean(1),
        }
        if roles.clock.progress >= self.warmup:
            ours = -judged(alone, out, first).gather(1, y[:, None])[:, 0]
            theirs = -judged(others, out, first).gather(2, near[..., None])[..., 0].mean(1)
            terms |= {
                "base_classes": ours + theirs,
                "new_classes": -says.gather(2, far_classes[..., None])[..., 0].mean(1),
            }
        batch.note(**{f"ogen_{NOTED.get(name, name)}": value for name, value in terms.items()})
        return h.new_zeros(len(h)).masked_scatter(
            here, torch.stack([getattr(self, name) * value for name, value in terms.items()]).sum(0)
        )
