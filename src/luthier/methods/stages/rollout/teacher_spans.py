"""Stores the log-probabilities that a teacher with another tokenizer gives to spans of each completion, as a
column; then its model is freed.

A span ends where both tokenizations have a token boundary; the teacher's log-probabilities of its tokens are
summed per span. Prompts use the teacher's own chat template. Rows with a completion whose text the teacher's
tokenizer does not reproduce are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, completion_logprobs, pieces, text_of
from luthier.registry import Column, stage

TEACHER_SPANS = Column(
    "teacher_spans",
    per="token",
    example=(-4.0, 1.0, 1.0),
    says="a teacher's log-probabilities of spans of text (stage teacher_spans)",
)

# of a token that ends no span, and of one that is in none; log-probabilities are never above 0
INSIDE, OUTSIDE = 1.0, 2.0


@stage(
    paper="arXiv:2503.20083",
    requires=[COMPLETIONS, LOGPROBS],
    provides=[TEACHER_SPANS],
    contract={"gives": "it needs a teacher model, which the recipe names"},
    use_when="the teacher has another tokenizer than the student, for objective `alm`.",
    costs="one forward pass of the teacher over all rows; then its memory is free.",
)
class TeacherSpans(Stage):
    """Column teacher_spans: for each token of a completion the teacher's log-probability of the span that
    ends there, else 1, or 2 where no span covers it.
    """

    model: str = "toy:lm"  # the teacher: a run's folder, a model's folder, a Hub name or toy:NAME
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        from luthier.model.loaded import load

        rows = self.usable(rows, roles)
        if not rows:
            return []
        teacher = load(self.model, dtype=str(roles.policy.model.dtype).removeprefix("torch.")).roles
        plain = [
            {
                "id": r["id"],
                "prompt": _plain(roles, r["prompt"]),
                "completions": [text_of(roles, c) for c in r["completions"]],
            }
            for r in rows
        ]
        encoded, bad, _ = teacher.policy.architecture.encode_all(plain, teacher.renderer)
        self.left(
            roles, len(bad), len(rows), f"the teacher cannot encode them: {bad[0]['reason']}" if bad else ""
        )
        own, out, spans, covered = {r["id"]: r for r in rows}, [], 0, [0, 0]
        for read, values in zip(
            encoded, completion_logprobs(teacher.policy, teacher, encoded, self.batch_size), strict=True
        ):
            row = own.get(read["id"])
            if row is None:  # a conversation that the teacher's template would cut into several
                continue
            columns = [
                along(len(ours), ends(roles, ours, teacher, theirs), logprobs)
                for ours, theirs, logprobs in zip(
                    _supervised_ids(roles, row), _supervised_ids(teacher, read), values, strict=True
                )
            ]
            if all(any(v <= 0 for v in column) for column in columns):
                out.append({**row, "teacher_spans": columns})
                flat = [v for column in columns for v in column]
                spans, covered = (
                    spans + sum(v <= 0 for v in flat),
                    [
                        covered[0] + sum(v != OUTSIDE for v in flat),
                        covered[1] + len(flat),
                    ],
                )
        self.left(
            roles,
            len(encoded) - len(out),
            len(rows),
            "the teacher's tokenizer does not reproduce their text",
        )
        if not out:
            raise RecipeError(
                "stage 'teacher_spans': no completion has the same text under the tokenizers"
                f" of {self.model} and of the policy, so nothing can be aligned"
            )
        self.warn(
            roles,
            f"{spans:,} spans of {covered[0] / max(1, spans):.1f} tokens, covering"
            f" {covered[0] / covered[1]:.1%} of all tokens",
        )
        return out


def ends(roles: Any, ours: Sequence[int], teacher: Any, theirs: Sequence[int]) -> list[tuple[int, int]]:
    """After how many tokens on each side both have written the same text; last, that both have said that they
    are done.
    """
    a, b = (
        [t for t in ids if t not in who.renderer.stop_ids] for ids, who in ((ours, roles), (theirs, teacher))
    )
    left, right = pieces(roles, a), pieces(teacher, b)
    if "".join(left) != "".join(right):
        return []
    there = _cuts(right)
    cuts = [(i, there[place]) for place, i in _cuts(left).items() if place in there]
    return [*cuts, (len(ours), len(theirs))] if len(a) < len(ours) and len(b) < len(theirs) else cuts


def along(n: int, cuts: Sequence[tuple[int, int]], logprobs: Sequence[float]) -> list[float]:
    """The column of one completion of n tokens; told: the teacher's log-probability of each of its own."""
    column, last = [INSIDE] * n, (0, 0)
    for end in cuts:
        column[end[0] - 1] = min(0.0, sum(logprobs[last[1] : end[1]]))
        last = end
    return column[: last[0]] + [OUTSIDE] * (n - last[0])


def _cuts(words: Sequence[str]) -> dict[int, int]:
    """Characters written -> tokens that wrote them; a token that only begins a character cuts nowhere."""
    return {
        place: i + 1
        for i, (place, word) in enumerate(zip(accumulate(map(len, words)), words, strict=True))
        if word
    }


def _supervised_ids(roles: Any, row: dict) -> list[list[int]]:
    """Supervised token ids of each completion."""
    batch = roles.batch([row])
    return [part.tolist() for part in torch.split(batch.labels[batch.targets], batch.lengths.long().tolist())]


def _plain(roles: Any, prompt: Any) -> Any:
    return roles.text(prompt) if prompt and isinstance(prompt[0], int) else prompt
