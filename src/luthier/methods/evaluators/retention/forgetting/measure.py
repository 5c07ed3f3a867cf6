"""How rows of a probe are measured: the likeliest of several answers, a greedy answer that is checked, the
loss of a text, and for rows of any data whether every token is the likeliest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.methods.evaluators._base import batches, liked, named, read
from luthier.methods.evaluators.quality.accuracy import exact
from luthier.methods.evaluators.quality.loss import shares
from luthier.methods.evaluators.retention.forgetting.checks import passes
from luthier.methods.evaluators.retention.forgetting.probe import CHECK, CHOICE, NEXT_QUESTION

OTHER = "other tasks"  # the skill of rows that name none
OWN_TEXTS = "own texts"  # and of texts: those that the model generated itself
# tokens of an answer that suffice for a check; a longer one has failed it, or has passed it
TOKENS = {"words": 8, "one_of": 8, "digits": 8, "starts": 8, "exactly": 16, "case": 16, "declines": 20}


@dataclass
class Measured:
    """What was measured of each row, by its id."""

    loss: dict[str, float] = field(default_factory=dict)  # its part: their mean is the loss per token
    accuracy: dict[str, float] = field(default_factory=dict)  # 1 where the row is right, else 0
    skills: dict[str, str] = field(default_factory=dict)  # of the rows that name one
    answers: list[dict] = field(default_factory=list)  # what was generated, and whether it passes
    tokens: dict[str, int] = field(default_factory=dict)  # of the rows that have a loss

    def by_skill(self) -> dict[str, dict[str, float]]:
        """Skill -> accuracy of its rows, in the order of the rows."""
        out: dict[str, dict[str, float]] = {}
        for name, value in self.accuracy.items():
            out.setdefault(self.skills.get(name, OTHER), {})[name] = value
        return out

    def texts_by_skill(self) -> dict[str, dict[str, float]]:
        """Skill -> loss of its rows that have no accuracy, in the order of the rows."""
        out: dict[str, dict[str, float]] = {}
        for name, value in self.loss.items():
            if name not in self.accuracy:
                out.setdefault(self.skills.get(name, OWN_TEXTS), {})[name] = value
        return out

    def scale(self, rows: Collection[str]) -> float:
        """What losses of these rows are multiplied with, so that their mean is the loss per token of these
        rows: as they are, it is that of all rows.
        """
        mean = sum(self.tokens.values()) / len(self.tokens)
        return mean * len(rows) / max(1, sum(self.tokens[name] for name in rows))


def measure(
    roles: Any, rows: Sequence[dict], batch_size: int | None, max_new_tokens: int, accuracy: bool = True
) -> Measured:
    """Every row, in its own way. accuracy: whether rows without `measure` have one right answer."""
    measured = Measured()
    choices = [row for row in rows if row.get("measure") == CHOICE]
    checks = [row for row in rows if row.get("measure") == CHECK]
    others = liked([row for row in rows if row.get("measure") not in (CHOICE, CHECK)])
    answered = set()
    for row in [*choices, *checks, *others]:
        names = [str(row["id"])]
        if "measure" not in row:
            names = named(row)
            answered.update(names if accuracy else ())
        if "skill" in row:
            measured.skills |= dict.fromkeys(names, str(row["skill"]))
    measured.accuracy |= choose(roles, choices, batch_size)
    answer(roles, checks, max_new_tokens, measured)
    stats = read(roles, others, batch_size, {"loss", "first"} if answered else {"loss"})
    if sum(value.tokens for value in stats.values()):
        measured.loss = shares(stats)
        measured.tokens = {name: value.tokens for name, value in stats.items()}
        measured.accuracy |= exact({name: value for name, value in stats.items() if name in answered})
    return measured


def choose(roles: Any, rows: Sequence[dict], batch_size: int | None) -> dict[str, float]:
    """Row id -> 1 where the right answer is the likeliest, the end of the turn left out."""
    right = {}
    ends = roles.renderer.stop_ids
    for batch in batches(roles, rows, batch_size):
        logprobs = roles.policy.outputs(batch).logprobs.double()
        sums, last = batch.sums(logprobs), batch.last(logprobs)
        last_labels = batch.last(batch.labels[batch.targets]).tolist()
        for i, label in enumerate(last_labels):
            if label in ends:
                sums[i] -= last[i]
        scores = batch.column("scores")
        for group, row in enumerate(batch.rows):
            mine = (batch.group == group).nonzero().squeeze(1)
            right[str(row["id"])] = float(scores[mine[sums[mine].argmax()]] > 0)
    return right


def answer(roles: Any, rows: Sequence[dict], max_new_tokens: int, measured: Measured) -> None:
    """Greedy answers, and what is checked of them, into `measured`; no longer than it takes to check them."""
    groups: dict[int, list[dict]] = {}
    for row in rows:
        sizes = [TOKENS.get(name, max_new_tokens) for name in row["check"]]
        groups.setdefault(min(max_new_tokens, *sizes), []).append(row)
    for size, some in groups.items():
        write(roles, some, size, measured)


def write(roles: Any, rows: Sequence[dict], size: int, measured: Measured) -> None:
    """Greedy answers of at most `size` tokens, and whether they pass, into `measured`."""
    written = roles.policy.generate(
        [roles.renderer.prompt(row) for row in rows],
        seeds=[0] * len(rows),
        temperature=0.0,
        max_new_tokens=size,
        stop=roles.renderer.stop_ids,
    )
    for row, (ids,) in zip(rows, written, strict=True):
        text = roles.renderer.answer(ids)
        if isinstance(row["prompt"], str):
            text = text.partition(NEXT_QUESTION)[0]
        right = passes(text, row["check"])
        measured.accuracy[str(row["id"])] = float(right)
        record = {"id": row["id"], "skill": row["skill"], "prompt": row["prompt"], "answer": text}
        measured.answers.append({**record, "check": row["check"], "passes": right})
