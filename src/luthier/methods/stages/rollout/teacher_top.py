"""Stores the teacher's k most likely tokens at every position as columns, so that its model need not stay in
memory (FIRST).

With temperature: auto the probabilities are calibrated first, p^(1/T) renormalised, with the T of a grid that
has the lowest expected calibration error on these rows. All other tokens count as one outcome in it, so that
what is stored stays a part of the whole distribution (the paper renormalises over the k tokens).
Log-probabilities are stored in 16 bits.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.roles._base import TEACHER
from luthier.methods.stages._base import Stage
from luthier.model.policy import eval_mode
from luthier.registry import Column, build, stage

TEACHER_IDS = Column(
    "teacher_ids",
    per="token",
    says="a teacher's most likely tokens, stored with the rows",
    example=([1, 7, 3], [9, 2, 4], [11, 5, 8]),
)
TEACHER_LOGPROBS = Column(
    "teacher_logprobs",
    per="token",
    says="a teacher's log-probabilities of its most likely tokens",
    example=([-0.5, -1.5, -2.5], [-0.2, -2.0, -3.0]),
)

GRID = tuple(0.5 + 0.1 * i for i in range(36))  # temperatures that are tried


@stage(
    paper="arXiv:2408.12168",
    row="first-trustworthy-distillation",
    requires=[COMPLETIONS, TEACHER, TOPK],
    provides=[TEACHER_IDS, TEACHER_LOGPROBS],
    contract={"gives": "it needs a teacher model, which the recipe names"},
    use_when="the teacher does not fit beside the student, for objective `first`.",
    costs="one forward pass of the teacher over all rows, and k ids and log-probabilities a token;"
    " then its memory is free.",
    covers="the top k tokens with a temperature of least calibration error, from a grid.",
    omits="label smoothing, the paper's weaker alternative; the temperature is found on the rows themselves,"
    " not on further ones.",
    tests=["methods/objectives/distillation/test_first.py::test_calibration_keeps_the_rest"],
)
class TeacherTop(Stage):
    """Columns teacher_ids and teacher_logprobs: [tokens][k] for each completion."""

    k: Annotated[int, Field(ge=1)] = 5  # tokens stored per position
    # temperature of the teacher; auto: by calibration on these rows
    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @torch.no_grad()
    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        lengths, parts = [], []
        for i in range(0, len(rows), self.batch_size):
            batch = roles.batch(rows[i : i + self.batch_size])
            with eval_mode(roles.policy.model):
                logprobs, ids = roles.teacher.outputs(batch).top(self.k)
            parts.append((logprobs.float().cpu(), ids.cpu(), batch.labels[batch.targets].cpu()))
            lengths += batch.lengths.long().tolist()
        if not parts:
            return []
        logprobs, ids, labels = (torch.cat(x) for x in zip(*parts, strict=True))
        t = self.temperature if self.temperature != "auto" else calibrated(logprobs, ids[:, 0] == labels)
        self.warn(
            roles,
            f"the teacher's top {self.k} tokens have {float(logprobs.exp().sum(1).mean()):.1%}"
            f" of its probability; T = {t:g}",
        )
        tempered = at_temperature(logprobs, t).half().tolist()
        ids, sizes, out, place = ids.tolist(), iter(lengths), [], 0
        for row in rows:
            columns = {"teacher_ids": [], "teacher_logprobs": []}
            for _ in row["completions"]:
                n = next(sizes)
                columns["teacher_ids"].append(ids[place : place + n])
                columns["teacher_logprobs"].append(tempered[place : place + n])
                place += n
            out.append({**row, **columns})
        return out


def at_temperature(logprobs: Tensor, t: float) -> Tensor:
    """[T, k] log-probabilities -> [T, k] at this temperature, all other tokens taken as one outcome."""
    if t == 1:
        return logprobs
    rest = (1 - logprobs.exp().sum(1, keepdim=True)).clamp(min=0).log()
    return (torch.cat([logprobs, rest], 1) / t).log_softmax(-1)[:, :-1]


def calibrated(logprobs: Tensor, right: Tensor) -> float:
    """[T, k] log-probabilities, [T] whether the likeliest is right -> the temperature of least calibration
    error.
    """

    def error(t: float) -> float:
        sure = at_temperature(logprobs, t)[:, 0].exp().double()
        table = build("evaluator", "calibration").table(sure, right.double())
        return sum(n * abs(s - r) for n, s, r in table)

    return min(GRID, key=error)
