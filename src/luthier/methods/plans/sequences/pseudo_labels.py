"""Pretraining on one's own predictions: a tuned model labels further rows, a fresh model is trained on these
labels, and then on the true ones.

Pseudo labels and true ones have runs of their own, where self-training mixes them: errors of the first are
unlearned by the second. With `rounds` the result labels again.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2011.09031",
    row="pseudo-label-pretraining",
    use_when="few rows are labelled and many of the same domain are not.",
    costs="three runs, of which one is over the unlabelled rows; two more with each further round.",
    covers="tuning, labelling, training a fresh model on the labels, and on the true ones; confident or"
    " balanced rows alone; rounds; labels as texts behind the prompt or as classes (`classifier`).",
    omits="the paper's data sets.",
    tests=[
        "methods/plans/sequences/test_pseudo_labels.py::test_four_steps",
        "methods/plans/sequences/test_pseudo_labels.py::test_no_rows_is_plain_fine_tuning",
        "methods/plans/sequences/test_pseudo_labels.py::test_accuracy_rises_over_the_first_step",
        "methods/plans/sequences/test_pseudo_labels.py::test_a_classifier_labels_by_its_classes",
    ],
)
class PseudoLabelPretraining(Plan):
    """Runs: labelled rows, then for each round pseudo labels from the recipe's start and labelled rows from
    there. The last is the plan's result.
    """

    unlabelled: Any = None  # rows with prompts, as `data` names them; null or empty: plain fine-tuning
    rounds: Annotated[int, Field(ge=1), Range(1, 3)] = 1  # how often the rows are labelled
    least: Annotated[float, Field(ge=0, le=1)] = 0.0  # rows whose label is less probable are dropped
    balance: bool = False  # as many rows of each label, the surest

    def recipes(self, recipe):
        report = yield recipe
        if not self.unlabelled:
            return report
        for _ in range(self.rounds):
            folder = str(report.folder)
            label = {"name": "pseudo_labels", "labels_of": recipe.data}
            label |= {"least": self.least, "balance": self.balance}
            teacher = {"name": "model", "model": folder}
            before = yield recipe.but(
                data=self.unlabelled,
                stages=[label],
                roles={**recipe.roles, "reference": teacher},
                eval_data=0,
            )
            report = yield recipe.but(init_from=before.folder)
        return report
