"""LiST: lite self-training from a few labelled prompts. A teacher tuned on them labels further rows softly,
a student that begins with adapters warmed up on the labelled rows learns these labels, weighted by what
they do for the labelled rows, and is the next teacher.

The network stays frozen where the recipe's tuner trains adapters alone; the paper's are `{name:
sublayer_adapter, insertion: sequential, non_linearity: linear, composition: add, bottleneck: 128}`. Labels
stand behind the prompt, at the mask token of architecture `masked_lm` or as an answer. Departs: the teacher
is tuned by the same tuner (the paper's first one in full), and soft labels are the labels weighted by their
probabilities, whose cross-entropy is that of the distributions over the vocabulary."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2110.06274",
    row="list-lite-self-training",
    use_when="ten to thirty rows of each label are at hand, many without a label, and little may be stored"
    " for each task.",
    costs="a run on the labelled rows, and in each round the unlabelled rows read with each label, and a"
    " run on them with a backward pass for each row's weight.",
    covers="prompted teacher and student, rounds, soft pseudo labels, adapters that begin warmed up,"
    " weights by the one-step meta gradient.",
    omits="a teacher tuned in full, and the GLUE results of RoBERTa-large.",
    tests=[
        "methods/plans/sequences/test_lite_self_training.py::test_students_become_teachers",
        "methods/plans/sequences/test_lite_self_training.py::test_weights_are_clipped_products_of_gradients",
        "methods/plans/sequences/test_lite_self_training.py::test_flipped_labels_weigh_less",
        "methods/plans/sequences/test_lite_self_training.py::test_soft_labels_are_their_cross_entropy",
    ],
)
class LiteSelfTraining(Plan):
    """Runs: labelled rows, then for each round soft labels by the last run, learned from the first run's
    end. The last is the plan's result.
    """

    unlabelled: Any = None  # rows with prompts, as `data` names them; null or empty: plain fine-tuning
    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 2  # how often the rows are labelled and learned
    reweight: bool = True  # weigh pseudo labels by the meta gradient
    batch: Annotated[int, Field(ge=1)] = 16  # labelled rows of each meta gradient
    least: Annotated[float, Field(ge=0, le=1)] = 0.0  # rows whose label is less probable are dropped

    def recipes(self, recipe):
        report = yield recipe
        if not self.unlabelled:
            return report
        warm, teacher = str(report.folder), str(report.folder)
        for _ in range(self.rounds):
            label = {"name": "pseudo_labels", "labels_of": recipe.data, "soft": True, "least": self.least}
            weigh = {"name": "meta_weights", "labelled": recipe.data, "batch": self.batch}
            report = yield recipe.but(
                data=self.unlabelled,
                stages=[label],
                online_stages=[weigh] if self.reweight else [],
                roles={**recipe.roles, "reference": {"name": "model", "model": teacher}},
                eval_data=0,
                init_from=warm,
            )
            teacher = str(report.folder)
        return report
