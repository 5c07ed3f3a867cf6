"""Measurements of one run at several steps, in a file of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.methods.evaluators.quality.labels import ranks
from luthier.methods.evaluators.representation.implicit_value import correlation
from luthier.storage import files


def record(path: Path, when: str, point: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds a measurement with its `step` -> all so far. Before training the file begins anew; of a run that
    goes on, what an attempt that was stopped measured at this step or later leaves.
    """
    points: list[dict[str, Any]] = []
    if when != "before" and path.is_file():
        points = [earlier for earlier in files.read_rows(path) if earlier["step"] < point["step"]]
    points.append(point)
    files.write_rows(path, points)
    return points


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Correlation of ranks of two [N]; equal values share a rank. None where one of them does not vary."""
    order = ranks(torch.stack([x.double(), y.double()], 1))
    return correlation(order[:, 0], order[:, 1])
