"""The last reply as it is served, where the chat template writes it otherwise once it is there.

Templates of reasoning models open a reply with <think> and leave the reasoning out of replies that are given;
others put the system prompt before the last turn only where the user speaks last. Served is what the template
asks with, and then the reply: so it is learned.
"""

from __future__ import annotations

from luthier.methods.formats._base import BadRow
from luthier.text.chat import Chat, split_thoughts
from luthier.text.turns import Span, is_supervised

THINK = "<think>"
ENDING = 12  # characters of what the template asks with, by which the place of a reply is recognised


def served_reply(
    chat: Chat, row: dict, turns: list[dict], first: int, opening: str, empty_thoughts: bool
) -> tuple[str, list[Span]] | None:
    """(the conversation with its last turn written after `opening`, the span of that turn); None where the
    last turn is not the only supervised one, or cannot be placed.

    empty_thoughts: where `opening` begins the reasoning and the turn has none, it is closed at once.
    """
    last = turns[-1]
    if len(turns) != first + 1 or last["role"] != "assistant" or not is_supervised(last):
        return None
    try:
        whole = chat.render(row, turns)
    except BadRow:
        return None
    reasoning, answer = split_thoughts(last)
    answer = chat.without_end(answer).strip()
    request = opening.rstrip()
    thinks = request.endswith(THINK)
    if thinks != bool(reasoning) and not (thinks and empty_thoughts):
        return None
    if last.get("tool_calls"):
        reply = after_request(whole, request.removesuffix(THINK))
    else:
        reply = answer_and_end(chat, whole, answer, opening)
    if not reply or (thinks and THINK[1:] in reply):
        return None
    if thinks:
        reply = f"{reasoning.strip()}\n</think>\n\n{reply.lstrip()}"
    return opening + reply, [(len(opening), len(opening) + len(reply))]


def after_request(whole: str, request: str) -> str:
    """The reply in a rendered conversation that begins with what the template asks with; "" where it does
    not.
    """
    if whole.startswith(request):
        return whole[len(request) :]
    return ""


def answer_and_end(chat: Chat, whole: str, answer: str, opening: str) -> str:
    """An answer as it stands at the end of a rendered conversation, with the space before and the end of turn
    after it; "" where it does not stand there.
    """
    place = whole.rfind(answer)
    if not answer or place < 0:
        return ""
    before, tail = whole[:place], whole[place + len(answer) :]
    if chat.special is not None and chat.special.sub("", tail).strip():
        return ""  # more than the end of the turn comes after it
    request, head = opening.rstrip(), before.rstrip()
    if request.endswith(THINK):
        return answer + tail
    if not head.endswith(request[-ENDING:]):
        return ""
    if opening == request:
        answer = before[len(head) :] + answer
    return answer + tail
