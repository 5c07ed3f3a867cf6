"""A prompt and a list of completions without scores: what luthier itself writes, and sets of equally good
answers.
"""

from luthier.methods.formats._base import COMPLETIONS, BadRow, Format, alike, opened, side, tools
from luthier.registry import row_format


@row_format(provides=[COMPLETIONS])
class Completions(Format):
    """{"prompt": "Hi", "completions": ["Hello!"]}; every completion is one to learn."""

    columns = ("prompt completions",)
    optional = "tools"

    def read(self, raw):
        given = opened(raw.get("completions"), "completions")
        if not isinstance(given, list) or not given:
            raise BadRow("completions is not a list of completions")
        prompt = "" if raw.get("prompt") == "" else side(raw.get("prompt"), "prompt")
        prompt, completions = alike(prompt, *(side(c, "completions") for c in given))
        return {"prompt": prompt, "completions": completions, "tools": tools(raw)}
