"""A chat template as a Go template for Ollama, where it writes every message of a role alike.

The pieces around each role's messages are read from what the template writes for messages of known content.
They are only used where they put together what the template writes for a longer conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from luthier.methods.exporters.gguf._tokens import adds_beginning

MARKS = {"system": "@1SYSTEM1@", "user": "@2USER2@", "assistant": "@3ASSISTANT3@"}


@dataclass(frozen=True)
class Pieces:
    """What stands around the content of each role's messages, before an answer, and the system prompt that
    the template writes where there is none.
    """

    around: dict[str, tuple[str, str]]
    answer: str
    system: str

    def write(self, messages: list[dict[str, str]]) -> str:
        """A conversation that is to be answered, by the pieces."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text = ""
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def go(self) -> str:
        """The template in Go."""
        text = "{{- range $i, $_ := .Messages }}"
        text += "{{- $last := eq (len (slice $.Messages $i)) 1 }}"
        for place, (role, (before, after)) in enumerate(self.around.items()):
            condition = f'if eq .Role "{role}"'
            text += "{{- " + ("else " if place else "") + condition + " }}"
            ending = _literal(after)
            if role == "assistant":  # an answer that was begun is not ended
                ending = "{{ if not $last }}" + ending + "{{ end }}"
            text += _literal(before) + "{{ .Content }}" + ending
        text += "{{- end }}"
        text += '{{- if and $last (ne .Role "assistant") }}' + _literal(self.answer) + "{{ end }}"
        return text + "{{- end }}"


def _literal(text: str) -> str:
    """Text as it is, in a Go template: actions trim the space around them, so that it stands in quotes."""
    if not text:
        return ""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '{{ "' + quoted + '" }}'


def pieces_of(tokenizer: Any) -> Pieces | None:
    """None where the template does not write every message of a role alike."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    messages = {role: {"role": role, "content": mark} for role, mark in MARKS.items()}
    system, user, assistant = messages["system"], messages["user"], messages["assistant"]
    beginning = ""
    if adds_beginning(tokenizer):  # so does whoever reads the file, to what the template writes
        beginning = tokenizer.bos_token

    def render(*turns: dict[str, str], answered: bool = True) -> str:
        options = {"tokenize": False, "add_generation_prompt": not answered}
        return tokenizer.apply_chat_template(list(turns), **options).removeprefix(beginning)

    try:
        alone, opened = render(user), render(user, answered=False)
        both, led = render(user, assistant), render(system, user)
        again = render(user, assistant, user)
        pieces = _pieces(alone, opened, both, led, again)
        if pieces is None:
            return None
        for turns in ([user], [system, user], [system, user, assistant, user], [user, assistant, user]):
            if pieces.write(turns) != render(*turns, answered=False):
                return None
    except (TemplateError, ValueError, TypeError, KeyError, IndexError):
        return None
    return pieces


def _pieces(alone: str, opened: str, both: str, led: str, again: str) -> Pieces | None:
    """From what a template writes for a question, one that is to be answered, one with its answer, one after
    a system prompt, and two with an answer between.
    """
    system, user, assistant = MARKS.values()
    before_user, after_user = alone.split(user)
    if not opened.startswith(alone):
        return None
    answer = opened[len(alone) :]
    between, after_answer = both.split(user)[1].split(assistant)
    if not between.startswith(after_user):
        return None
    before_answer = between[len(after_user) :]
    follows = again.split(assistant)[1].split(user)[0]
    if not follows.startswith(after_answer):
        return None
    before_next = follows[len(after_answer) :]  # what stands before a question that is not the first
    head, rest = led.split(system)
    leads = rest.split(user)[0]
    if not leads.endswith(before_next) or not before_user.endswith(before_next):
        return None
    after_system = leads[: len(leads) - len(before_next)]
    default = before_user[: len(before_user) - len(before_next)]
    if default:  # a system prompt of the template's own
        if not (default.startswith(head) and default.endswith(after_system)):
            return None
        default = default[len(head) : len(default) - len(after_system)]
    around = {
        "system": (head, after_system),
        "user": (before_next, after_user),
        "assistant": (before_answer, after_answer),
    }
    return Pieces(around, answer, default)
