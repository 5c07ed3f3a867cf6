"""Several completions of one prompt, each with a score."""

from luthier.methods.formats._base import (
    RANKED,
    BadRow,
    Format,
    alike,
    first_of,
    numbers,
    opened,
    prompt_of,
    side,
    tools,
)
from luthier.registry import row_format


@row_format(
    provides=[RANKED],
    use_when="rows have several completions with a score each, for list objectives or to make pairs from.",
)
class Ranked(Format):
    """{"prompt": "Hi", "completions": ["Hello!", "What?"], "scores": [0.9, 0.2]}; higher is better."""

    reading = "completions with a score each; a higher one is better"
    objective = "lipo_lambda"
    columns = ("prompt completions scores", "prompt responses scores")
    optional = "tools"

    def read(self, raw):
        name = first_of(raw, ("completions",), "responses")
        texts, scores = opened(raw.get(name), name), numbers(raw.get("scores"), "scores")
        if not isinstance(texts, list) or not texts:
            raise BadRow(f"{name} is not a list of completions")
        if len(texts) != len(scores):
            raise BadRow(f"there are {len(texts)} completions but {len(scores)} scores")
        prompt = prompt_of(raw)
        prompt, completions = alike(prompt, *(side(c, name) for c in texts))
        return {"prompt": prompt, "completions": completions, "scores": scores, "tools": tools(raw)}
