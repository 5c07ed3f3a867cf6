"""Groups rows by whether models of earlier runs label them rightly, so that what these models go by no
longer pays off in the worst group.

The rows' labels are the classes; a model's label of a row is the one that it finds likeliest. Of one model
the groups are `right` and `wrong`, of several each pattern such as `right-wrong`, in which each label counts
as much as every other. With objective `by_source`
and estimator `group_dro` this is a round of discovery of rich feature construction (Zhang et al., 2022).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES, SOURCE
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import Stage, completion_logprobs, without
from luthier.methods.stages.curate.key_tokens import TOKEN_WEIGHTS
from luthier.registry import stage
from luthier.storage.files import read_rows
from luthier.storage.layout import ROWS


@stage(
    example={"of": "policy"},
    paper="arXiv:2203.15516",
    row="bonsai-rfc",
    requires=[COMPLETIONS, LOGPROBS],
    provides=[SOURCE, TOKEN_WEIGHTS],
    removes=[PAIRS, SCORES],
    use_when="rows that a model gets wrong are to be a group of their own, such as for `group_dro`.",
    costs="a forward pass over every row with each label.",
    covers="groups by the sign of correctness, splits of several models, labels that count alike in each"
    " group, an end where the last model is no better than chance in its worst group.",
    omits="the plan of rounds, the synthesis of one network with a head for each model, and what features it"
    " then has; groups that overlap: of several splits their common refinement is used.",
    tests=[
        "methods/stages/curate/test_error_groups.py::test_groups_are_the_signs_of_correctness",
        "methods/stages/curate/test_error_groups.py::test_splits_of_earlier_models_stay",
        "methods/stages/curate/test_error_groups.py::test_no_better_than_chance_leaves_no_rows",
    ],
)
class ErrorGroups(Stage):
    """Columns `predictions`, a label of each model, `source`, the group, and `token_weights`."""

    of: Literal["reference", "policy"] = "reference"  # the last model
    # folder of the run that made the last model: its rows have the labels of the models before it
    earlier: str | None = None
    chance: bool = False  # leave no rows where the last model is no better than chance in its worst group
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @property
    def active_requires(self):
        return self.requires | {REFERENCE} if self.of == "reference" else self.requires

    def __call__(self, rows, roles):
        rows = list(rows)
        labels = sorted({label_of(row) for row in rows})
        before = self.earlier_predictions()
        offers = self.usable([{**without(row), "completions": labels} for row in rows], roles)
        originals = {row["id"]: row for row in rows}
        out = []
        logprobs = completion_logprobs(getattr(roles, self.of), roles, offers, self.batch_size)
        for offer, tokens in zip(offers, logprobs, strict=True):
            sums = [sum(some) for some in tokens]
            row, likeliest = originals[offer["id"]], labels[sums.index(max(sums))]
            earlier = before.get(str(row["id"]), []) if self.earlier is not None else []
            own = [1.0] * len(tokens[labels.index(label_of(row))])
            out.append({**row, "predictions": [*earlier, likeliest], "token_weights": [own]})
        worst = worst_group(out)
        self.measure(roles, worst_group_accuracy=worst)
        if self.chance and worst <= 1 / max(1, len(labels)):
            return self.drop(roles, out, [], "the last model is no better than chance in its worst group")
        return balanced(out)

    def earlier_predictions(self) -> dict[str, list[str]]:
        """Row's id -> labels of the models before the last; empty where that was the first."""
        if self.earlier is None:
            return {}
        path = Path(self.earlier) / ROWS
        if not path.is_file():
            raise RecipeError(f"stage 'error_groups': {self.earlier} has no {ROWS}")
        return {str(row["id"]): list(row.get("predictions", ())) for row in read_rows(path)}


def label_of(row: dict) -> str:
    """The row's label. Raises RecipeError where its completion is no text."""
    label = row["completions"][0] if row.get("completions") else None
    if not isinstance(label, str):
        raise RecipeError("stage 'error_groups' needs rows whose completion is a label")
    return label


def group_of(row: dict, predictions: list[str]) -> str:
    """Whether each model is right: `right-wrong`."""
    label = label_of(row)
    return "-".join("right" if each == label else "wrong" for each in predictions)


def worst_group(rows: list[dict]) -> float:
    """The last model's accuracy in the worst group of the models before it; over all rows where it is the
    first. 0 without rows.
    """
    hits = defaultdict(list)
    for row in rows:
        hits[group_of(row, row["predictions"][:-1])].append(row["predictions"][-1] == label_of(row))
    return min((sum(some) / len(some) for some in hits.values()), default=0.0)


def balanced(rows: list[dict]) -> list[dict]:
    """The rows with group and weights: of mean 1 in each group, where labels weigh alike."""
    out, sizes, counts = [], Counter(), Counter()
    for row in rows:
        group = group_of(row, row["predictions"])
        sizes[group] += 1
        counts[group, label_of(row)] += 1
        out.append({**row, "source": group})
    present = Counter(group for group, _ in counts)
    for row in out:
        group = row["source"]
        weight = sizes[group] / present[group] / counts[group, label_of(row)]
        row["token_weights"] = [[weight * value for value in row["token_weights"][0]]]
    return out
