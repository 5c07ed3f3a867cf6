"""What is measured before, during and after tuning. An evaluator returns numbers by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier import store
from luthier.batch import Batch
from luthier.method import family


@family
class Evaluator:
    """Family: rows in, numbers out. Runs without gradient, the policy in evaluation mode."""

    def run(self, roles: Any, rows: Sequence[dict], folder: Path, when: str) -> dict[str, float]:
        """rows: held-out rows. folder: the run's, for what should be kept. when: before, during or after training."""
        raise NotImplementedError


ROWS, LETTERS = 16, 8192  # read at once: at least so many rows, and more while they have so many letters together


def batches(roles: Any, rows: Sequence[dict], size: int | None = None) -> Iterator[Batch]:
    """Rows as batches, those of like length together, so that little is wasted on padding. size: rows at once; where it is None,
    short ones come in larger batches, since each batch has its price."""

    def length(row: dict) -> int:
        return len(str(row["prompt"])) + sum(len(str(c)) for c in row["completions"])

    some, letters = [], 0
    for row in sorted(rows, key=length):
        if len(some) >= ROWS and letters + length(row) > LETTERS if size is None else len(some) == size:
            yield roles.batch(some)
            some, letters = [], 0
        some.append(row)
        letters += length(row)
    if some:
        yield roles.batch(some)


def liked(rows: Sequence[dict]) -> list[dict]:
    """Each row with only its best completion; rows whose only completion is a bad one leave."""
    out = []
    for row in rows:
        scores = row.get("scores")
        if scores is None or len(row["completions"]) == 1:
            if scores is None or scores[0] > 0:
                out.append(row)
            continue
        best = max(range(len(scores)), key=scores.__getitem__)
        out.append({**row, "completions": [row["completions"][best]], "scores": [scores[best]]})
    return out


def paired(rows: Sequence[dict]) -> list[dict]:
    """Rows with at least two completions of different score."""
    return [r for r in rows if len(r["completions"]) > 1 and len(set(r.get("scores", ()))) > 1]


def named(row: dict) -> list[str]:
    """What its completions are called in by-row files: the row's id, and their place where there are several."""
    n = len(row["completions"])
    return [str(row["id"])] if n == 1 else [f"{row['id']}/{k}" for k in range(n)]


def keep(folder: Path, when: str, **values: Mapping[str, float]) -> None:
    """Into by-row-<when>.json: row id -> what a metric says of this row, its mean over rows being the metric. Runs on the
    same rows are compared row by row with it."""
    path = folder / f"by-row-{when}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    store.write_json(path, {**known, **values})
