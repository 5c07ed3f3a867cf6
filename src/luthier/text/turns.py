"""Which characters of a rendered conversation are trained on, checked turn by turn.

A template that writes earlier turns differently once more follow is found out here: what is trained on must
be what is served later.
"""

from __future__ import annotations

from luthier.methods.formats._base import BadRow
from luthier.text.chat import Chat

REWRITES = (
    "the chat template changes earlier turns when later ones follow, so the trained text would"
    " differ from the text at inference; keep one supervised assistant turn per row, or set"
    " another chat_template"
)
Span = tuple[int, int]  # [start, end) in characters


class Rewrites(BadRow):
    """The chat template writes a turn differently once others follow."""


def is_supervised(turn: dict) -> bool:
    """Whether a turn is trained on: the assistant's unless it says no, another's only where it says yes."""
    return turn.get("loss", turn["role"] == "assistant") is True and turn.get("loss_scale") != 0


def supervised_spans(
    chat: Chat, row: dict, turns: list[dict], first: int, opening: str, whole: str
) -> list[Span]:
    """The span of each supervised turn from turn `first` on in `whole`, the rendered conversation.

    opening: the prompt as the template renders it with the beginning of a reply. Raises Rewrites where the
    template writes earlier turns differently once others follow, BadRow where it begins a reply in another
    way than it asks for one.
    """
    spans: list[Span] = []
    for i in range(first, len(turns)):
        replies = turns[i]["role"] == "assistant"
        supervised = is_supervised(turns[i])
        if not replies and not supervised:
            continue
        before = ""
        if replies and i == first:
            before = opening
        elif i:
            before = chat.render(row, turns[:i], add_generation_prompt=replies)
        after = whole
        if i + 1 < len(turns):
            after = chat.render(row, turns[: i + 1])
        if not after.startswith(before):
            unasked = chat.render(row, turns[:i])
            ending = before.removeprefix(unasked)[-40:]
            raise BadRow(
                f"the chat template's generation prompt (ending in {ending!r}) is not how it begins a reply"
            )
        if not whole.startswith(after):
            raise Rewrites(REWRITES)
        if supervised:
            spans.append((len(before), len(after)))
    if chat.marks_generation:
        return generation_spans(chat, row, turns, first, spans)
    return spans


def generation_spans(chat: Chat, row: dict, turns: list[dict], first: int, spans: list[Span]) -> list[Span]:
    """The spans of supervised turns, the assistant's narrowed to what the template marks with
    {% generation %}.
    """
    marked = chat.generated(row, turns)
    narrowed: list[Span] = []
    for (start, stop), turn in zip(spans, filter(is_supervised, turns[first:]), strict=True):
        if turn["role"] != "assistant":
            narrowed.append((start, stop))
            continue
        inner = [offset for offset in marked if start <= offset[0] < stop]
        if not inner:
            raise BadRow("the chat template has no {% generation %} block in an assistant turn")
        narrowed.append((inner[0][0], inner[-1][1]))
    return narrowed
