"""What a stream of tasks leaves behind: the transfer matrix and the numbers that are computed from it.

R[i][j] is the score on task j after run i, row 0 the score before any training (Lopez-Paz and Ranzato, 2017).
With T tasks: average accuracy A = mean_j R[T][j]; backward transfer B = mean_{j<T} R[T][j] - R[j][j]; forward
transfer F = mean_{j>1} R[j-1][j] - R[0][j]; forgetting = mean_{j<T} max_{j<=l<T} R[l][j] - R[T][j]
(Chaudhry et al., 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from luthier.methods.evaluators._base import Change, paired_change, per_example_file
from luthier.storage import files

Matrix = Sequence[Sequence[float]]  # [T + 1, T]


def average_accuracy(scores: Matrix) -> float:
    """The mean over all tasks at the end of the stream."""
    return sum(scores[-1]) / len(scores[-1])


def forgetting(scores: Matrix) -> float:
    """How far each task but the last fell from its best since it was learned; 0 for a single task."""
    last = len(scores) - 1
    if last < 2:
        return 0.0
    falls = [max(scores[run][j] for run in range(j + 1, last)) - scores[last][j] for j in range(last - 1)]
    return sum(falls) / len(falls)


def backward_pairs(tasks: int) -> list[tuple[int, int, int]]:
    """(task, row of the matrix before, row after): each task but the last, from its own run to the end."""
    return [(j, j + 1, tasks) for j in range(tasks - 1)]


def forward_pairs(tasks: int) -> list[tuple[int, int, int]]:
    """Each task but the first, from before any training to just before its own run."""
    return [(j, 0, j) for j in range(1, tasks)]


def transfer(scores: Matrix, pairs: Sequence[tuple[int, int, int]]) -> float:
    """The mean change over these pairs; 0 where there are none."""
    if not pairs:
        return 0.0
    return sum(scores[after][j] - scores[before][j] for j, before, after in pairs) / len(pairs)


def interval(changes: Sequence[Change]) -> tuple[float, float]:
    """Of the mean of independent changes, from the interval of each: the method of variance estimates
    recovery (Zou and Donner, 2008), which needs no symmetric intervals.
    """
    count = len(changes)
    mean = sum(change.difference for change in changes) / count
    down = math.sqrt(sum((change.difference - change.low) ** 2 for change in changes)) / count
    up = math.sqrt(sum((change.high - change.difference) ** 2 for change in changes)) / count
    return mean - down, mean + up


def change_of_rows(
    metric: str, before: tuple[str, str], after: tuple[str, str], level: float = 0.95
) -> Change | None:
    """A metric of the same rows at two moments, each (folder, before | after); None where not all was
    measured row by row.
    """
    values = []
    for folder, when in (before, after):
        path = per_example_file(Path(folder), when)
        if not path.is_file():
            return None
        values.append(files.read_object(path).get(metric))
    first, second = values
    if not first or not second or first.keys() != second.keys():
        return None
    return paired_change(first, second, level)
