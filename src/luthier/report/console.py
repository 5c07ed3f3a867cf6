"""What a person at a terminal sees: sentences, a progress bar with rate and time left, rows as the model will read them."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Quiet:
    """Sees everything, keeps the sentences, prints nothing."""

    def __init__(self):
        self.notes: list[str] = []

    def tell(self, sentence: str) -> None:
        """Something the user should know."""
        self.notes.append(sentence)

    def stage(self, name: str) -> None:
        """What is being done now."""

    def rows(self, roles: Any, rows: Sequence[dict], stats: dict) -> None:
        """The data, about to be learned."""

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        """Around the steps."""
        yield

    def step(self, log: dict) -> None:
        """After each step."""
