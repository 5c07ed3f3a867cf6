"""A row as token ids, and what came of encoding many rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple


@dataclass(slots=True)
class Encoded:
    """A row as token ids."""

    prompt: list[int]  # [P]
    completions: list[list[int]]  # K of [C_k]
    supervised: list[list[bool]]  # K of [C_k]: which tokens of a completion are trained on
    # K of [C_k]: how much each counts, where a turn has a `loss_scale` other than 1
    scales: list[list[float]] | None = None

    def weights(self) -> list[list[float]] | None:
        """The scales of the supervised tokens alone: the column `token_weights`."""
        if self.scales is None:
            return None
        weights = []
        for scales, supervised in zip(self.scales, self.supervised, strict=True):
            weights.append(list(compress(scales, supervised)))
        return weights

    def keep(self, start: int, stop: int | None) -> None:
        """Keep of every completion the tokens [start, stop) alone."""
        part = slice(start, stop)
        self.completions = [completion[part] for completion in self.completions]
        self.supervised = [supervised[part] for supervised in self.supervised]
        if self.scales is not None:
            self.scales = [scales[part] for scales in self.scales]

    def __len__(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(map(len, self.completions), default=0)


class EncodedAll(NamedTuple):
    """What came of encoding many rows."""

    rows: list[dict]  # those that can be used; long texts in pieces
    bad: list[dict]  # {"where": id, "reason", "raw"}
    # rows, tokens, supervised, supervised_share, longest, cut, pieces, turns, boundary_mismatches
    stats: dict[str, float]
