"""A prompt and the completion to train on, as text or as messages."""

from luthier.methods.formats._base import COMPLETIONS, Format, alike, prompt_of, side, tools
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows have a prompt and one completion, and the text between them is exactly as you want it.",
)
class PromptCompletion(Format):
    """{"prompt": "2+2=", "completion": " 4"}; an empty prompt is allowed. Nothing is put between the two."""

    reading = "`completion` continues `prompt`"
    columns = ("prompt completion",)
    optional = "tools"

    def read(self, raw):
        prompt = prompt_of(raw)
        prompt, completions = alike(prompt, side(raw.get("completion"), "completion"))
        return {"prompt": prompt, "completions": completions, "tools": tools(raw)}
