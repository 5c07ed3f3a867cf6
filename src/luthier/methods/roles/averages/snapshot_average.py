"""The mean of the policy's last snapshots, more of them the longer it has trained: OGEN's teacher.

A snapshot is taken at intervals (once an epoch in the paper) and the last m are averaged, with m growing from
`least` to `most` along a cosine: an early, undertrained snapshot soon drops out, and late overfitting is
averaged out.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.roles._base import Role, brought
from luthier.methods.roles.averages._average import Averaged, _flat
from luthier.registry import role


@role(
    former="recent",
    paper="arXiv:2401.15914",
    row="ogen",
    use_when="objective `ogen` needs it, or a teacher that averages the last snapshots rather than all"
    " steps.",
    costs="one copy of the trainable parameters for each of up to `most` snapshots.",
)
class SnapshotAverage(Role):
    """An average over a window of snapshots. Each takes a copy of the trainable parameters."""

    most: Annotated[int, Field(ge=1)] = 9  # snapshots that are averaged at the end
    least: Annotated[int, Field(ge=1)] = 2  # snapshots that are averaged at first
    every: Annotated[float, Field(gt=0)] = 0.05  # steps between snapshots; below 1 a share of the run

    def __post_init__(self):
        if self.least > self.most:
            raise RecipeError("least: must not be above most, since the window grows")

    def parts(self, policy):
        return {"snapshots": Snapshots(policy.attached, self)}

    def play(self, name, policy):
        snapshots = brought(policy, name, "snapshots")
        return policy.as_role(name, lambda: policy.attached.using(snapshots.tensors()))

    def window(self, share: float) -> int:
        """How many are averaged when so much of the run is done."""
        return self.least + math.floor(
            (1 + math.cos((1 + min(share, 1.0)) * math.pi)) / 2 * (self.most - self.least)
        )


class Snapshots(Averaged):
    """The last few, the newest first, and their mean."""

    taken: torch.Tensor
    snapshots: dict[str, torch.Tensor]  # name -> [most, ...] the newest first

    def __init__(self, tuned: Any, settings: SnapshotAverage):
        self.settings, self.snapshots = settings, {}
        super().__init__(tuned)
        self.register_buffer("taken", torch.ones((), dtype=torch.long))

    def begin(self, name, p):
        super().begin(name, p)
        self.snapshots[name] = p.float()[None].repeat(self.settings.most, *[1] * p.ndim)

    def end(self, name):
        super().end(name)
        del self.snapshots[name]

    def restart(self, name, p, mask):
        super().restart(name, p, mask)
        self.snapshots[name][:, mask] = p.float()[mask]

    def memory(self):
        snapshots = {f"{self.name}.kept:{_flat(name)}": some for name, some in self.snapshots.items()}
        return super().memory() | snapshots

    def ready(self, rows, roles):
        super().ready(rows, roles)
        self.taken.fill_(0)
        self.take(0.0)

    def after_step(self, clock):
        every = self.settings.every
        steps = max(1, round(every * clock.total) if every < 1 else int(every))
        if (clock.step + 1) % steps == 0:
            self.take((clock.step + 1) / max(clock.total, 1))

    @torch.no_grad()
    def take(self, share: float) -> None:
        """Another snapshot, now."""
        self.taken += 1
        n = min(int(self.taken), self.settings.window(share))
        for name, p in self.trained().items():
            snapshots = self.snapshots[name]
            snapshots.copy_(snapshots.roll(1, 0))
            snapshots[0] = p.float()
            self.average[name].copy_(snapshots[:n].mean(0))
