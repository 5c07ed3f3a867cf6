"""The kind's protocol: what is measured before, during and after training. An evaluator returns
numbers by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from luthier.registry import family
from luthier.storage import files

if TYPE_CHECKING:
    from luthier.model.batch import Batch


@family
class Evaluator:
    """Family: rows in, numbers out. Runs without gradient, the policy in evaluation mode."""

    def run(self, roles: Any, rows: Sequence[dict], folder: Path, when: str) -> dict[str, float]:
        """rows: held-out rows. folder: the run's, for what should be kept. when: before, during or after
        training.
        """
        raise NotImplementedError


class TokenStats(NamedTuple):
    """Of a completion; nan where a statistic was not requested."""

    tokens: int  # supervised ones
    loss: float  # their -log p together
    first: float  # how many of them are the most likely token


@family
class PerExample(Evaluator):
    """Family: numbers computed from the token statistics of each row's best completion, which is read once
    for all of them.
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short
    asks: ClassVar[frozenset[str]] = frozenset({"loss"})  # of what is said: loss, first

    def summarize(
        self, stats: Mapping[str, TokenStats], roles: Any, rows: Sequence[dict], folder: Path, when: str
    ) -> dict[str, float]:
        """said: by the name of the completion. The rest as in `run`."""
        raise NotImplementedError

    def run(self, roles, rows, folder, when):
        return self.summarize(read(roles, rows, self.batch_size, self.asks), roles, rows, folder, when)


def run_all(
    evaluators: Sequence[Any], roles: Any, rows: Sequence[dict], folder: Path, when: str
) -> dict[str, float]:
    """What all of them say, in turn."""
    needs: dict[int | None, frozenset[str]] = {}
    for e in evaluators:
        if isinstance(e, PerExample):
            needs[e.batch_size] = needs.get(e.batch_size, frozenset()) | e.asks
    stats = {size: read(roles, rows, size, asks) for size, asks in needs.items()}
    out: dict[str, float] = {}
    for e in evaluators:
        out |= (
            e.summarize(stats[e.batch_size], roles, rows, folder, when)
            if isinstance(e, PerExample)
            else e.run(roles, rows, folder, when)
        )
    return out


def read(roles: Any, rows: Sequence[dict], size: int | None, asks: Set[str]) -> dict[str, TokenStats]:
    """Of each row's best completion, by its name."""
    out: dict[str, TokenStats] = {}
    progress = getattr(roles.policy, "progress", None)  # a stand-in of a policy may have none
    for batch in batches(roles, liked(rows), size):
        if progress is not None:
            progress(len(out), len(rows), "rows")
        outputs, sizes = roles.policy.outputs(batch), [int(n) for n in batch.lengths.tolist()]
        losses = firsts = [math.nan] * len(sizes)
        if "loss" in asks:
            losses = (-batch.sums(outputs.logprobs.double())).tolist()
        if "first" in asks:
            firsts = [
                round(n)
                for n in batch.sums((outputs.first() == batch.labels[batch.targets]).float()).tolist()
            ]
        names = [name for row in batch.rows for name in named(row)]
        out |= {
            name: TokenStats(*values)
            for name, values in zip(names, zip(sizes, losses, firsts, strict=True), strict=True)
        }
    return out


# read at once: at least so many rows, and more while they have so many letters together
ROWS, LETTERS = 16, 8192
COMMON = 256  # letters that prompts begin with in common, from which on they are read together


def batches(roles: Any, rows: Sequence[dict], size: int | None = None) -> Iterator[Batch]:
    """Rows as batches, those of like length together, so that little is wasted on padding; where most prompts
    have a long beginning in common that is read once, those which begin alike. size: rows at once; where it
    is None, short ones come in larger batches, since each batch has its price.
    """
    ordered = sorted(rows, key=_letters)
    common = [0] * len(ordered)  # letters that a row's prompt begins with as the one before
    policy = getattr(roles, "policy", None)
    architecture = getattr(policy, "architecture", None)  # a stand-in of a policy may have none
    if size is None and architecture is not None and architecture.shares_prefixes(policy.attached):
        alike = sorted(rows, key=lambda row: str(row["prompt"]))
        letters_alike = [0, *(_common_letters(a, b) for a, b in pairwise(alike))]
        if 2 * sum(n >= COMMON for n in letters_alike) > len(rows):
            ordered, common = alike, letters_alike
    some, letters = [], 0
    for row, begun in zip(ordered, common, strict=True):
        more = _letters(row) - begun
        if len(some) >= ROWS and letters + more > LETTERS if size is None else len(some) == size:
            yield roles.batch(some)
            some, letters = [], 0
        letters += more if some else _letters(row)
        some.append(row)
    if some:
        yield roles.batch(some)


def _letters(row: dict) -> int:
    return len(str(row["prompt"])) + sum(len(str(c)) for c in row["completions"])


def _common_letters(one: dict, other: dict) -> int:
    """How many letters two prompts begin with in common, where they are many."""
    common = len(commonprefix([str(one["prompt"]), str(other["prompt"])]))
    return common if common >= COMMON else 0


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
    """What its completions are called in per-example files: the row's id, and their place where there
    are several.
    """
    n = len(row["completions"])
    return [str(row["id"])] if n == 1 else [f"{row['id']}/{k}" for k in range(n)]


def per_example_file(folder: Path, when: str) -> Path:
    """Where a run keeps what its metrics say of each row; in runs of version 0.1 the file has
    another name.
    """
    path, former = folder / f"per_example-{when}.json", folder / f"by-row-{when}.json"
    return former if former.is_file() and not path.is_file() else path


def keep(folder: Path, when: str, **values: Mapping[str, float]) -> None:
    """Into per_example-<when>.json: row id -> what a metric says of this row, its mean over rows being the
    metric. Runs on the same rows are compared row by row with it.
    """
    path = folder / f"per_example-{when}.json"
    saved = files.read_object(path) if path.is_file() else {}
    files.write_json(path, {**saved, **values})


class Change(NamedTuple):
    """A mean over rows before and after, with an interval of its change."""

    before: float
    after: float
    difference: float
    low: float
    high: float


def paired_change(before: Mapping[str, float], after: Mapping[str, float], level: float = 0.95) -> Change:
    """Values of the same rows by name, before and after -> their means and the change.

    Of right and wrong (1 and 0) the interval is that of Bonett and Price (2012) for paired proportions, which
    has a width even where no row changed; of other values Student's t. Raises ValueError where there are no
    rows or other ones.
    """
    from scipy.special import ndtri, stdtrit  # scipy.stats computes the same, and takes 0.7 s to import

    if not after or before.keys() != after.keys():
        raise ValueError("the rows before and after are not the same")
    size = len(after)
    changes = [after[name] - before[name] for name in after]
    means = sum(before.values()) / size, sum(after.values()) / size
    difference = sum(changes) / size
    if {*before.values(), *after.values()} <= {0.0, 1.0}:
        gained = (changes.count(1.0) + 1) / (size + 2)
        lost = (changes.count(-1.0) + 1) / (size + 2)
        centre = gained - lost
        error = ((gained + lost - centre**2) / (size + 2)) ** 0.5
        half = float(ndtri((1 + level) / 2)) * error
        return Change(*means, difference, max(-1.0, centre - half), min(1.0, centre + half))
    if size < 2:
        return Change(*means, difference, -math.inf, math.inf)
    variance = sum((change - difference) ** 2 for change in changes) / (size - 1)
    half = float(stdtrit(size - 1, (1 + level) / 2)) * (variance / size) ** 0.5
    return Change(*means, difference, difference - half, difference + half)
