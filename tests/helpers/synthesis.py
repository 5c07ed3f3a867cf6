"""A scripted writer, and roles for stages that ask it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from luthier.clock import Clock


class Scripted:
    """Replies by a function of the prompt and the seed; counts what it is asked."""

    name = "scripted"

    def __init__(self, reply: Callable[[str, int], str]):
        self.reply, self.prompts = reply, []

    def ask(self, prompt: str, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256) -> str:
        self.prompts.append(prompt)
        return self.reply(prompt, seed)


def nobody(folder=None) -> SimpleNamespace:
    """Roles without a model."""
    sentences: list[str] = []
    return SimpleNamespace(
        clock=Clock(), warn=sentences.append, sentences=sentences, dropped={}, folder=folder
    )
