"""The kind's protocol: rows in, rows out. A stage processes a whole data set before training (`stages`) or
the rows of one step (`online_stages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from luthier.processes import group
from luthier.registry import Capability, Column, declared_words, family
from luthier.storage.layout import STAGES

SAMPLES = Capability(
    "samples",
    says="completions that the policy itself has just sampled",
    advice="e.g. `online_stages: [{name: rollout, n: 8}, {name: score, reward: exact_match}]`",
    of_rows=True,
    costs="sampling several completions of each prompt at each step; usually most of the time of a run.",
)
OLD_LOGPROBS = Column(
    "old_logprobs",
    per="token",
    says="the sampler's own log-probabilities",
    example=(-3.5, -3.4, -3.6),
    former="old",
)
TRUNCATED = Column("truncated", per="completion", says="whether a sample ended without a stop token")
CACHED_LOGPROBS = Column(
    "cached_logprobs", per="token", says="log-probabilities cached with the rows", former="remembered"
)
# key of a row that a step has for the second time, or later (its draw goes on into the next epoch): how often
# it came before, whichever process has those
OCCURRENCE = "occurrence"
REWARDS = Column(
    "rewards",
    says="several rewards of each completion, by name (column `rewards`)",
    example=({"other": [0.2, 0.9, 0.4]}, {"other": [0.7, 0.1, 0.5]}),
)


@cache
def completion_columns() -> frozenset[str]:
    """Columns with an entry for each completion, of every method that declares one."""
    return frozenset(name for name, column in declared_words("Column").items() if column.per != "row")


@family
class Stage:
    """Family: may add and remove columns, and drop rows. A row is never changed in place."""

    # False: works on the rows alone, and can be tried before a model is loaded
    asks_model: ClassVar[bool] = True
    # draws that are sampled before the current one is trained on; of a live stage that samples
    ahead: ClassVar[int] = 0
    # does it make one row, or none, of each row by itself? Then what a private run promises for rows holds
    row_by_row: ClassVar[bool] = False

    def __call__(self, rows: Sequence[dict], roles: Any) -> Iterable[dict]:
        """rows: in canonical form. roles: who may be asked; the policy as it is now."""
        raise NotImplementedError

    def labels_ahead(self) -> list[str]:
        """Labels that it will give to rows without one: a classifier has its classes before any stage
        runs.
        """
        return []

    def left(self, roles: Any, count: int, total: int, why: str) -> None:
        """Tell how many rows leave and why: what is thrown away is never thrown away in silence."""
        if count:
            self.warn(roles, f"{count} of {total} rows are dropped: {why}")

    def drop(self, roles: Any, rows: Sequence[dict], chosen: Iterable[int], why: str) -> list[dict]:
        """Keep the rows at these places, in their order; the others leave with a line in dropped.jsonl."""
        places = {*chosen}
        chosen_rows, names = [], []
        for place, row in enumerate(rows):
            if place in places:
                chosen_rows.append(row)
            else:
                names.append(row["id"])
        for name in names:
            getattr(roles, "dropped", {}).setdefault(name, why)
        self.left(roles, len(names), len(rows), why)
        return chosen_rows

    def measure(self, roles: Any, **metrics: float) -> None:
        """Numbers about the rows for the run's report, under `stages`; of stages before training only."""
        getattr(roles, "stage_metrics", {}).update(metrics)

    def warn(self, roles: Any, sentence: str) -> None:
        """Say something about the rows; of a live stage, which meets rows at every step, only the
        first time.
        """
        if roles.clock.step == roles.clock.first:
            roles.warn(f"stage '{self.name}': {sentence}")

    def usable(self, rows: Sequence[dict], roles: Any) -> list[dict]:
        """The rows as the network will read them: long texts in pieces, without those that cannot be read."""
        answered = [row for row in rows if row.get("completions")]
        self.left(roles, len(rows) - len(answered), len(rows), "they have no completion")
        readable, bad, _ = roles.policy.architecture.encode_all(answered, roles.renderer)
        self.left(roles, len(bad), len(rows), bad[0]["reason"] if bad else "")
        return readable


def workspace(roles: Any, name: str, folder: str | None = None) -> Path | None:
    """Where a stage keeps what it needs to go on after it was killed: `folder`, else a place in the run's
    folder; None where there is no run. Every process of a run has one of its own.
    """
    if folder is None and getattr(roles, "folder", None) is None:
        return None
    path = Path(folder).expanduser() if folder is not None else Path(roles.folder) / STAGES / name
    index = group.current().index
    if index:
        path = path / f"process-{index}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def text_of(roles: Any, completion: Any) -> str:
    """What a completion says: text, the assistant's turns, or token ids."""
    if isinstance(completion, str):
        return completion
    if completion and isinstance(completion[0], dict):
        return "\n".join(
            str(turn.get("content") or "") for turn in completion if turn.get("role") == "assistant"
        )
    return roles.text(completion)


def pieces(roles: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, as it adds to those before it; joined they are the whole, special
    tokens shown.
    """
    texts, decode = [], partial(roles.renderer.text, special=True)
    for i in range(len(ids)):
        first = max(0, i - 4)  # far enough for characters that take several tokens
        before = decode(list(ids[first:i]))
        now = decode(list(ids[first : i + 1]))
        texts.append(
            now[len(before) :] if not before.endswith("\ufffd") else now[len(before.rstrip("\ufffd")) :]
        )
    return texts


def pick(row: dict, places: Sequence[int]) -> dict:
    """A row with some of its completions only, and of all that belongs to them."""
    n = len(row["completions"])

    def belongs(name: str, value: Any) -> bool:
        """Known columns, and whatever holds a list of numbers for each completion."""
        numbers = isinstance(value, list) and all(
            isinstance(v, list) and v and isinstance(v[0], float) for v in value
        )
        return name in completion_columns() or bool(numbers)

    def few(name: str, value: Any) -> Any:
        if name == "rewards" and isinstance(value, dict):
            return {k: [v[i] for i in places] for k, v in value.items()}
        return [value[i] for i in places] if belongs(name, value) and len(value) == n else value

    return {name: few(name, value) for name, value in row.items()}


def without(row: dict, *more: str) -> dict:
    """A row without what was said about its completions, which are about to be others."""
    return {k: v for k, v in row.items() if k not in (*completion_columns(), "rewards", *more)}


@torch.no_grad()
def completion_logprobs(
    policy: Any, roles: Any, rows: Sequence[dict], size: int
) -> Iterator[list[list[float]]]:
    """Of each row, the log-probabilities that a role gives the supervised tokens of each completion; without
    dropout.
    """
    for i in range(0, len(rows), size):
        batch = roles.batch(rows[i : i + size])
        with roles.policy.eval_mode():
            flat = policy.logprobs(batch).float().tolist()
        feed, sizes = iter(flat), iter(batch.lengths.long().tolist())
        for row in batch.rows:
            yield [[next(feed) for _ in range(next(sizes))] for _ in row["completions"]]


def best_first(row: dict) -> list[int]:
    """Places of a row's completions from the highest score to the lowest; of equals the earlier first."""
    scores = row["scores"]
    return sorted(range(len(scores)), key=lambda k: -scores[k])
