"""Talk to a model in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.model.loaded import Loaded, load, user_turn
from luthier.report.text import visible

HELP = """\
/help            this list
/reset           start over: the conversation so far is forgotten (also /new)
/system TEXT     set the system prompt and start over; without TEXT there is none
/image PATH      show an image with the next prompt, to a model that reads images
/compare MODEL   let another model answer too, such as the base model; without MODEL it stops
/quit            leave"""


class Conversation:
    """What was typed and answered so far, under one system prompt."""

    def __init__(self, loaded: Loaded, system: str, how: Mapping[str, Any]):
        self.loaded, self.system, self.how = loaded, system, dict(how)
        self.turns: list[dict] = []
        self.images: list[str] = []  # of the next prompt

    def reset(self, system: str | None = None) -> None:
        """Forget the conversation; with another system prompt, where one is given."""
        self.turns, self.images = [], []
        if system is not None:
            self.system = system

    def answer(self, text: str) -> str:
        """The model's answer, which becomes a part of the conversation."""
        before = list(self.turns)
        if self.system:
            before.insert(0, {"role": "system", "content": self.system})
        images, self.images = self.images, []
        answer = self.loaded.ask(text, before, images=images, **self.how).strip()
        self.turns += [user_turn(text, images), {"role": "assistant", "content": answer}]
        return visible(answer)


def chat(
    name: str,
    prompt: str | None = None,
    *,
    ask: Callable[[str], str] = input,
    say: Callable[[str], Any] = print,
    system: str | None = None,
    images: Sequence[str] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **how: Any,
) -> None:
    """Answer one prompt, or talk until the other side has nothing more to say (an empty end of input, or
    /quit).

    system: the system prompt; by default the one that all rows of the run had. images: paths of images that
    the first prompt is about. chat_template_kwargs: for the
    chat template, beside the run's own. how: as in `Loaded.generate`.
    """
    settings: dict[str, Any] = {}
    if chat_template_kwargs:
        settings["chat_template_kwargs"] = dict(chat_template_kwargs)
    loaded = load(name, **settings)
    talk = Conversation(loaded, loaded.system if system is None else system, how)
    talk.images += images
    if prompt is not None:
        say(talk.answer(prompt))
        return
    for note in loaded.notes:
        say(f"· {note}")
    say(f"{name}: {greeting(loaded)}; type /help for commands, /quit to exit")
    if talk.system and loaded.turns:
        say(f"· system prompt: {visible(talk.system)}")
    others: dict[str, Conversation] = {}
    while True:
        try:
            text = ask("> ").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        try:
            if text.startswith("/"):
                command(text, talk, others, say)
            elif text:
                say(talk.answer(text))
                for other, conversation in others.items():
                    say(f"[{other}] {conversation.answer(text)}")
        except RecipeError as why:
            say(f"· {why}")


def command(
    text: str, talk: Conversation, others: dict[str, Conversation], say: Callable[[str], Any]
) -> None:
    """Do what a line that begins with / asks for. others: models that answer beside, by name. Raises
    RecipeError where a model cannot be loaded.
    """
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word in ("/reset", "/new", "/system"):
        system = rest if word == "/system" else None
        for conversation in (talk, *others.values()):
            conversation.reset(system)
        say("· a new conversation")
    elif word == "/image":
        if not Path(rest).expanduser().is_file():
            raise RecipeError(f"there is no file {rest}")
        for conversation in (talk, *others.values()):
            conversation.images.append(str(Path(rest).expanduser()))
        say(f"· {rest} goes with the next prompt")
    elif word == "/compare":
        others.clear()
        if rest:
            other = Conversation(load(rest), talk.system, talk.how)
            if talk.turns:
                talk.reset()
                say("· a new conversation, so that both models see the same")
            others[rest] = other
            say(f"· {rest} answers too: {greeting(other.loaded)}")
    elif word == "/help":
        say(HELP)
    else:
        say(f"· there is no command {word}\n{HELP}")


def greeting(loaded: Loaded) -> str:
    """How what is typed reaches the model."""
    if loaded.turns:
        return "multi-turn chat; type /reset to start over"
    text = "plain text completion, not a chat; write \\n for a line break"
    if loaded.ends:
        text += " (one is appended to each prompt, as in training)"
    return text
