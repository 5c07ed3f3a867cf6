"""What the labels of rows are: classes, several at once, or measurements."""

from __future__ import annotations

from collections import Counter
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.architectures.text.classifier.heads import MULTI, REGRESSION, SINGLE, numbers_of


def describe_labels(rows: list[dict], problem: str) -> dict[str, Any]:
    """Settings of a head for these rows: problem_type, num_labels, id2label, label2id. Empty without labels.

    problem: of transformers' words, or auto. Raises RecipeError where the labels are of another kind.
    """
    if problem == "auto":
        problem = MULTI if any(len(_listed(row)) > 1 for row in rows) else SINGLE
    if problem == REGRESSION:
        order = _outputs(rows)
    elif problem == MULTI:
        order = _names_of_several(rows)
    else:
        order = _names(rows)
    if not order:
        return {}
    return {
        "problem_type": problem,
        "num_labels": len(order),
        "id2label": dict(enumerate(order)),
        "label2id": {name: i for i, name in enumerate(order)},
    }


def names_of_row(row: dict, label2id: dict[str, int]) -> list[str]:
    """The labels that a row has, of several: names, or marks 0 and 1 in the order of the labels."""
    labels = row.get("label")
    if labels is None:
        labels = [name.strip() for name in row["completions"][0].split(",") if name.strip()]
    listed = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    if len(listed) == len(label2id) and _are_marks(listed) and not set(map(str, listed)) <= label2id.keys():
        order = sorted(label2id, key=label2id.__getitem__)
        return [name for name, mark in zip(order, listed, strict=True) if mark]
    return [str(name) for name in listed]


def class_weights_of(rows: list[dict], network: dict[str, Any], weights: Any) -> dict[str, float]:
    """Class -> how much it counts. balanced: rows / (classes * rows of the class); of several labels rows
    without it / rows with it. Raises RecipeError for a class that there is not.
    """
    label2id = network["label2id"]
    if weights != "balanced":
        unknown = sorted(weights.keys() - label2id.keys())
        if unknown:
            raise RecipeError(f"class_weights: no row has the class '{unknown[0]}'")
        return {name: float(weights.get(name, 1.0)) for name in label2id}
    several = network["problem_type"] == MULTI
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(names_of_row(row, label2id) if several else row.get("completions", ())[:1])
    balanced = {}
    for name in label2id:
        present = max(counts[name], 1)
        balanced[name] = len(rows) / len(label2id) / present
        if several:
            balanced[name] = max(len(rows) - present, 1) / present
    return balanced


def _listed(row: dict) -> list:
    label = row.get("label")
    return list(label) if isinstance(label, (list, tuple)) else []


def _are_marks(labels: list) -> bool:
    return all(isinstance(label, (bool, int, float)) and label in (0, 1) for label in labels)


def _outputs(rows: list[dict]) -> list[str]:
    """Names of the numbers that a regression gives."""
    sizes = set()
    for row in rows:
        try:
            sizes.add(len(numbers_of(row)))
        except ValueError as why:
            raise RecipeError(f"row {row.get('id')}: {why}; problem_type is regression") from None
    if len(sizes) > 1:
        raise RecipeError(
            f"rows have {min(sizes)} and {max(sizes)} numbers as labels; a regression needs as many of each"
        )
    count = max(sizes, default=0)
    if count == 1:
        return ["value"]
    return [f"value_{i}" for i in range(count)]


def _names_of_several(rows: list[dict]) -> list[str]:
    """The labels that occur; where rows have marks 0 and 1 in place of names, LABEL_0, LABEL_1, ..."""
    marked = [_listed(row) for row in rows]
    sizes = {len(labels) for labels in marked}
    if len(sizes) == 1 and min(sizes) > 1 and all(_are_marks(labels) for labels in marked):
        return [f"LABEL_{i}" for i in range(min(sizes))]
    names: set[str] = set()
    for row in rows:
        names.update(names_of_row(row, {}))
    return sorted(names, key=_number_or_name)


def _names(rows: list[dict]) -> list[str]:
    _check_single_labels(rows)
    names = {c for row in rows for c in row.get("completions", ())}
    if not all(isinstance(n, str) for n in names):
        raise RecipeError("a classifier needs rows with a `label` (or a completion that is a class name)")
    if not names:
        return []
    if len(names) == 1:
        raise RecipeError(f"all rows have the same class, '{min(names)}'; a classifier needs at least two")
    numbers = {
        row["completions"][0]: row["label"]
        for row in rows
        if len(row.get("completions", ())) == 1 and "label" in row
    }
    numbered = numbers.keys() == names and all(isinstance(v, (int, float)) for v in numbers.values())
    return sorted(names, key=(lambda n: (numbers[n], n)) if numbered else _number_or_name)


def _check_single_labels(rows: list[dict]) -> None:
    """Refuse rows of several labels each, and labels that are measurements."""
    labels = [row["label"] for row in rows if "label" in row]
    for row in rows:
        if len(_listed(row)) > 1:
            raise RecipeError(
                f"row {row.get('id')} has several labels ({row['completions'][0]}), and problem_type is"
                " single_label_classification; leave problem_type out, keep one label of each row, or let a"
                " causal model write them (architecture: causal)"
            )
    fractions = [v for v in labels if isinstance(v, float) and not v.is_integer()]
    if fractions and len(labels) > 10 and len(set(map(str, labels))) > len(labels) / 2:
        raise RecipeError(
            f"the labels are numbers that hardly repeat, such as {fractions[0]}: a class is learned, not a"
            " number; set `architecture: {name: classifier, problem_type: regression}`, or let a causal model"
            " write them (architecture: causal)"
        )


def _number_or_name(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name
