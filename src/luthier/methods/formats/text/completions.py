"""A prompt and a list of completions without scores: luthier's own output, and sets of equally
good answers.
"""

from luthier.methods.formats._base import (
    COMPLETIONS,
    BadRow,
    Format,
    alike,
    opened,
    prompt_of,
    side,
    tools,
)
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows have a prompt and several equally good answers, or were written by luthier's `rollout`.",
)
class Completions(Format):
    """{"prompt": "Hi", "completions": ["Hello!"]}; every completion is trained on."""

    reading = "prompts with equally good completions"
    columns = ("prompt completions",)
    optional = "tools"

    def read(self, raw):
        texts = opened(raw.get("completions"), "completions")
        if not isinstance(texts, list) or not texts:
            raise BadRow("completions is not a list of completions")
        prompt = prompt_of(raw)
        prompt, completions = alike(prompt, *(side(c, "completions") for c in texts))
        return {"prompt": prompt, "completions": completions, "tools": tools(raw)}
