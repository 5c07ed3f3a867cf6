"""Labels rows by a model: each row gets the label that it finds likeliest, as its completion.

The probability of a label is that of its text behind the prompt, among the labels. Labels are named, or
those of labelled rows (`labels_of`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, Stage, completion_logprobs, without
from luthier.methods.stages.curate.key_tokens import TOKEN_WEIGHTS
from luthier.registry import stage


@stage(
    example={"of": "policy", "labels": ["yes", "no"]},
    paper="arXiv:2011.09031",
    row="pseudo-label-pretraining",
    requires=[LOGPROBS],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES, OLD_LOGPROBS, CACHED_LOGPROBS],
    use_when="a tuned model is to label rows that have no label.",
    costs="a forward pass over every row with each label.",
    covers="the likeliest label of each row, with a least probability and classes of equal size on request,"
    " or all labels by their probabilities.",
    tests=[
        "methods/plans/sequences/test_lite_self_training.py::test_soft_labels_are_their_cross_entropy",
        "methods/plans/sequences/test_pseudo_labels.py::test_the_likeliest_label_is_taken",
        "methods/plans/sequences/test_pseudo_labels.py::test_unsure_rows_leave_and_classes_are_equal",
    ],
)
class PseudoLabels(Stage):
    """Column `completions` with the label, and `confidence`, its probability among the labels."""

    # the labels; empty: those of `labels_of`
    labels: list[str] = field(default_factory=list)
    labels_of: Any = None  # labelled rows that have each label, as `data` names them
    of: Literal["reference", "policy"] = "reference"  # who labels
    least: Annotated[float, Field(ge=0, le=1)] = 0.0  # rows whose label is less probable are dropped
    balance: bool = False  # as many rows of each label, the surest
    # soft labels: a row has all labels, whose tokens weigh (column `token_weights`) what they are probable
    soft: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @property
    def active_provides(self):
        return self.provides | {TOKEN_WEIGHTS} if self.soft else self.provides

    @property
    def active_requires(self):
        return self.requires | {REFERENCE} if self.of == "reference" else self.requires

    def __call__(self, rows, roles):
        labels = self.labels_ahead()
        offers = [{**without(row), "completions": list(labels)} for row in rows]
        offers = self.usable(offers, roles)
        out = []
        logprobs = completion_logprobs(getattr(roles, self.of), roles, offers, self.batch_size)
        for row, tokens in zip(offers, logprobs, strict=True):
            sums = [sum(some) for some in tokens]
            top = max(sums)
            share = 1 / sum(math.exp(one - top) for one in sums)
            likeliest = labels[sums.index(top)]
            labelled = {**row, "completions": [likeliest], "confidence": share}
            if self.soft:
                weights = [[share * math.exp(sum(own) - top)] * len(own) for own in tokens]
                labelled |= {"completions": list(labels), "token_weights": weights, "likeliest": likeliest}
            out.append(labelled)
        return self.drop(roles, out, self.sure(out), "their labels are not sure enough, or of a large class")

    def labels_ahead(self):
        return self.labels or self.labels_of_rows()

    def labels_of_rows(self) -> list[str]:
        """Labels of labelled rows, in alphabetical order. Raises RecipeError where there are none."""
        if self.labels_of is None:
            raise RecipeError("stage 'pseudo_labels': name the `labels`, or labelled rows (`labels_of`)")
        names = set()
        for row in load_rows(self.labels_of).rows:
            for one in row.get("completions", ()):
                names.add(one if isinstance(one, str) else one[-1]["content"])
        return sorted(names)

    def sure(self, rows: list[dict]) -> list[int]:
        """Places of the rows that stay."""
        by_label = defaultdict(list)
        for place, row in enumerate(rows):
            if row["confidence"] >= self.least:
                by_label[row.get("likeliest") or row["completions"][0]].append(place)
        size = min(map(len, by_label.values()), default=0) if self.balance else len(rows)
        places = []
        for several in by_label.values():
            several.sort(key=lambda place: -rows[place]["confidence"])
            places += several[:size]
        return places
