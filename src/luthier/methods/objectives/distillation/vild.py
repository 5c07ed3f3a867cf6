"""ViLD-image: what a network says of an image, or of a region of one, is drawn to the vector of a frozen
CLIP, by the L1 distance of their directions (Gu et al., 2021).

It is a term beside `sft`, which is ViLD-text on architecture `open_vocabulary`: `sft + 0.5*vild`. The vectors
are in column `region_embedding`, computed once (stage `region_embeddings`), and no label is read, so classes
that no row names are learned as well.
"""

import torch
import torch.nn.functional as F

from luthier.errors import RecipeError
from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.representation._features import answered, features
from luthier.methods.stages.curate.region_embeddings import REGION_EMBEDDING
from luthier.registry import objective


@objective(
    paper="arXiv:2104.13921",
    row="vild",
    requires=[COMPLETIONS, HIDDEN, REGION_EMBEDDING],
    contract={"head": "it uses features below the head; train the head with a loss beside it"},
    use_when="a network with architecture `open_vocabulary` is to know classes that no row is labelled with:"
    " add it to `sft` with the weight 0.5.",
    costs="no further forward pass; the vectors are computed before training.",
    starting_rate="that of `sft`.",
    covers="the L1 distance of directions, with or without labels.",
    omits="its own head beside that of the labels (the ensemble).",
    tests=[
        "methods/objectives/distillation/test_vild.py::test_the_loss_is_the_l1_distance_of_directions",
        "methods/architectures/vision/test_open_vocabulary.py::test_novel_classes_come_with_distillation_alone",
    ],
)
class ViLD(Objective):
    """Sum over dimensions of |h / ||h|| - v / ||v|||."""

    unit = "sequence"

    def count(self, batch):
        return len(answered(batch))

    def rows_of_units(self, batch):
        return batch.group[answered(batch)]

    def loss(self, roles, batch):
        own = features(batch, roles.policy.outputs(batch))
        vectors = []
        for group in self.rows_of_units(batch).tolist():
            row = batch.rows[group]
            vector = row[REGION_EMBEDDING]
            if len(vector) != own.shape[1]:
                raise RecipeError(
                    f"objective 'vild': row {row['id']} has a region_embedding of {len(vector)} numbers, and"
                    f" the network's states have {own.shape[1]}; use architecture open_vocabulary with the"
                    " same CLIP"
                )
            vectors.append(vector)
        target = torch.tensor(vectors, device=own.device, dtype=own.dtype).reshape(own.shape)
        return (F.normalize(own, dim=-1) - F.normalize(target, dim=-1)).abs().sum(1)
