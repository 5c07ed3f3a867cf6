"""Small row sets, a recipe that runs in a second, and example values of columns."""

from __future__ import annotations

SUMS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)}
    for a in range(8)
    for b in range(8)
]
PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no way " + "x" * a}
    for a in range(5)
    for b in range(5)
]
UNPAIRED = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b + b % 2), "label": b % 2 == 0}
    for a in range(5)
    for b in range(6)
]


def recipe_of(model: str) -> dict:
    """A recipe that runs in a second."""
    return {
        "model": model,
        "data": SUMS,
        "dtype": "float32",
        "tuner": "full",
        "objective": "sft",
        "max_steps": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "evaluate": [],
        "eval_data": 0,
    }


def example_value(column, row: dict, place: int = 0):
    """What a declared column holds in a row of a test: its examples in turn, of tokens from the last one
    back.
    """
    values = column.example
    if column.per == "row":
        return values[place % len(values)]
    if column.per == "completion":
        return [values[k % len(values)] for k in range(len(row["completions"]))]
    masks = row.get("supervised") or [[True] * len(c) for c in row["completions"]]
    return [[values[(sum(m) - 1 - t) % len(values)] for t in range(sum(m))] for m in masks]
