"""The step of a run, and the only source of chance: every draw follows from (seed, step, names), never from
history.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass
class Clock:
    """Step counter and seed. A run killed at any step draws the same numbers when it goes on."""

    seed: int = 0
    step: int = 0
    total: int = 1  # optimizer steps of the whole run
    first: int = 0  # the step at which this process began

    def derive_seed(self, *names: object, at: int | None = None) -> int:
        """A 63-bit number made of the seed, the step (or `at`) and names; alike on every machine and
        process.
        """
        step = self.step if at is None else at
        text = repr((self.seed, step, *names))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def rng(self, *names: object, at: int | None = None) -> torch.Generator:
        """A CPU generator for one draw."""
        return torch.Generator().manual_seed(self.derive_seed(*names, at=at))

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.step / max(self.total, 1)
