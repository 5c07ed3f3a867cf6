"""A memory bank of features: for each of the rows read last, the hidden state that predicts its answer, and
the answer's class.

What is stored at a step is available from the next step on, so a loss does not depend on how a batch is
split. A row that is stored already is replaced, not duplicated; the oldest are removed. Before the first step
the bank is filled from the run's own rows.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.objectives.representation._features import classes, features, of_rows
from luthier.methods.roles._base import Part, Role, brought, everyone, width_of
from luthier.model.policy import eval_mode
from luthier.registry import Capability, role

MEMORY = Capability(
    "memory",
    says="a memory of features",
    advice="use `roles: {memory: memory}`, with a running average of the policy as `teacher: mean_teacher`",
)


@role(
    provides=[MEMORY],
    use_when="an objective compares rows with many others than those of its batch (`look`).",
    costs="`size` feature vectors.",
)
class Memory(Role):
    """Features [size, width] with their classes."""

    starts_from_rows = True

    size: Annotated[int, Field(ge=1)] = 4096  # number of stored features

    def parts(self, policy):
        return {"features": Features(self.size, width_of(policy)).to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "features")


class Features(Part):
    """A queue of features; `count` of its `size` entries are filled."""

    features: Tensor
    classes: Tensor
    rows: Tensor
    written: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("classes", torch.zeros(size, dtype=torch.long))
        self.register_buffer("rows", torch.zeros(size, dtype=torch.long))
        # features that ever got a place of their own
        self.register_buffer("written", torch.zeros((), dtype=torch.long))
        self.pending: dict[int, tuple[int, Tensor]] = {}  # in this step: row -> class and feature

    @property
    def count(self) -> int:
        return min(int(self.written), len(self.rows))

    def remember(self, rows: Tensor, classes: Tensor, features: Tensor) -> None:
        """[N], [N], [N, d]: seen from the next step on. Said twice in a step, it counts once."""
        if features.shape[1] != self.features.shape[1]:
            raise RecipeError(
                f"the memory has width {self.features.shape[1]} but the hidden states have"
                f" {features.shape[1]}"
            )
        self.pending.update(
            zip(rows.tolist(), zip(classes.tolist(), features.detach().float(), strict=True), strict=True)
        )

    @torch.no_grad()
    def after_step(self, clock):
        place = {r: i for i, r in enumerate(self.rows[: self.count].tolist())}
        for row, (kind, feature) in everyone([(r, (c, f.cpu())) for r, (c, f) in self.pending.items()]):
            if row not in place:
                at = int(self.written) % len(self.rows)
                if int(self.written) >= len(self.rows):
                    place.pop(int(self.rows[at]), None)
                place[row] = at
                self.written += 1
            at = place[row]
            self.rows[at], self.classes[at] = row, kind
            self.features[at] = feature.to(self.features.device)
        self.pending = {}

    @torch.no_grad()
    def ready(self, rows, roles):
        self.written.zero_()
        for i in range(0, min(len(rows), len(self.rows)), 16):
            batch = roles.batch(rows[i : min(i + 16, len(self.rows))])
            with eval_mode(roles.policy.model):
                self.remember(of_rows(batch), classes(batch), features(batch, roles.policy(batch)))
        self.after_step(roles.clock)
