"""A conversation as messages: every assistant turn is supervised unless it has "loss": false.

A turn may also have "loss": true (of any role) and "loss_scale": 0.5, the weight of its tokens in `sft` and
similar objectives.
"""

from luthier.methods.formats._base import (
    COMPLETIONS,
    Format,
    as_list,
    conversation,
    first_of,
    messages,
    opened,
    tools,
    with_system,
)
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows are chats as `messages` with roles, in OpenAI's layout; tools may be among them.",
)
class Messages(Format):
    """{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tools":
    [...]}.

    `chat_template_kwargs` is passed to the chat template. Also Gemini's {"systemInstruction", "contents":
    [{"role": "user", "parts": [{"text": "Hi"}]}, ...]}, and LMSYS's and Firefly's `conversation`.
    """

    reading = "conversations in `messages`; the assistant's turns are learned"
    columns = ("messages", "conversation", "contents")
    # false: user, system and tool turns are supervised too, except those with "loss": false
    assistant_only_loss: bool = True

    optional = "tools system systemInstruction"

    def read(self, raw):
        name = first_of(raw, ("messages", "conversation", "contents"), "messages")
        value = raw.get(name)
        if name == "contents":
            value = gemini_turns(raw)
        turns = with_system(messages(value, name), raw)
        prompt, rest = conversation(turns, name, self.assistant_only_loss)
        return {"prompt": prompt, "completions": [rest], "tools": tools(raw)}


def gemini_turns(raw: dict) -> list:
    """Gemini's `contents` as turns with content; `systemInstruction` before them."""
    system = opened(raw.get("systemInstruction"), "systemInstruction")
    contents = as_list(opened(raw["contents"], "contents"))
    if isinstance(system, dict):
        contents = [{**system, "role": "system"}, *contents]
    turns = []
    for turn in contents:
        if isinstance(turn, dict) and "parts" in turn:
            rest = {key: value for key, value in turn.items() if key != "parts"}
            turn = {**rest, "content": as_text(turn["parts"])}
        turns.append(turn)
    return turns


def as_text(parts):
    """Parts that are all text as one text; others stay parts."""
    texts = []
    for part in as_list(parts):
        if not isinstance(part, dict) or part.keys() != {"text"}:
            return parts
        texts.append(str(part["text"]))
    return "".join(texts)
