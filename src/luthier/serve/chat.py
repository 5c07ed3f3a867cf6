"""Talk to a model in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.model.loaded import Loaded, load
from luthier.report.text import visible


def chat(
    name: str,
    prompt: str | None = None,
    *,
    ask: Callable[[str], str] = input,
    say: Callable[[str], Any] = print,
    **how: Any,
) -> None:
    """Answer one prompt, or talk until the other side has nothing more to say (an empty end of input, or
    /quit).

    how: as in `Loaded.generate`.
    """
    loaded = load(name)
    if prompt is not None:
        say(visible(loaded.ask(prompt, **how).strip()))
        return
    for note in loaded.notes:
        say(f"· {note}")
    say(f"{name}: {greeting(loaded)}; type /quit to exit")
    turns: list[dict] = []
    while True:
        try:
            text = ask("> ").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/new":
            turns = []
        elif text:
            answer = loaded.ask(text, turns, **how).strip()
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            say(visible(answer))


def greeting(loaded: Loaded) -> str:
    """How what is typed reaches the model."""
    if loaded.turns:
        return "multi-turn chat; type /new to start over"
    text = "plain text completion, not a chat; write \\n for a line break"
    if loaded.ends:
        text += " (one is appended to each prompt, as in training)"
    return text
