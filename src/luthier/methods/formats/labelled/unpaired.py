"""Unpaired feedback: a completion, and whether it was good (KTO)."""

from luthier.methods.formats._base import (
    UNPAIRED,
    Format,
    alike,
    first_of,
    instruction,
    last_reply,
    messages,
    side,
    text,
    tools,
    truth,
)
from luthier.registry import row_format


@row_format(
    provides=[UNPAIRED],
    use_when="rows have one completion and whether it was good, for `kto`.",
)
class Unpaired(Format):
    """{"prompt": "Hi", "completion": "Hello!", "label": true}; also messages and label, and LLaMA-Factory's
    kto_tag.

    In a conversation the label judges the last assistant turn.
    """

    reading = "completions, each marked good or bad"
    objective = "kto"
    columns = (
        "prompt completion label",
        "prompt completion kto_tag",
        "prompt response label",
        "query response label",
        "messages label",
        "messages kto_tag",
        "conversations label",
        "conversations kto_tag",
        "instruction output label",
        "instruction output kto_tag",
    )
    optional = "tools input system history"

    def read(self, raw):
        good = truth(raw, first_of(raw, ("kto_tag",), "label"))
        turns = first_of(raw, ("messages", "conversations"))
        if turns:
            prompt, completion = last_reply(messages(raw[turns], turns), turns)
        elif raw.get("instruction") is not None:
            prompt, completion = instruction(raw), text(raw, "output")
        else:
            request = first_of(raw, ("prompt",), "query")
            reply = first_of(raw, ("completion",), "response")
            prompt, completion = side(raw.get(request), request), side(raw.get(reply), reply)
        prompt, completions = alike(prompt, completion)
        score = -1.0
        if good:
            score = 1.0
        return {
            "prompt": prompt,
            "completions": completions,
            "scores": [score],
            "label": good,
            "tools": tools(raw),
        }
