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
    say(f"{name}: {greeting(loaded)}, /quit ends.")
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
        return "a conversation; /new begins another"
    text = "each prompt is continued as it is written, \\n is a line break"
    if loaded.ends:
        text += " (one is added at its end, as in training)"
    return text
