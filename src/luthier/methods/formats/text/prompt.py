"""A prompt to sample answers to; an `answer` column, tests and the like are kept for the rewards."""

from luthier.methods.formats._base import PROMPTS, Format, first_of, side, tools
from luthier.registry import row_format


@row_format(
    provides=[PROMPTS],
    use_when="rows are prompts alone, to sample answers to: reinforcement learning and rejection sampling.",
)
class Prompt(Format):
    """{"prompt": "2+2=", "answer": "4"}, as text or as messages; also {"question": ...} alone. No
    completions.
    """

    reading = "prompts without answers, which are sampled and rewarded"
    objective = "grpo"
    advice = "online_stages: [rollout, {name: score, reward: exact_match}]"
    columns = ("prompt", "question")
    optional = "tools"
    generic = True

    def read(self, raw):
        name = first_of(raw, ("prompt",), "question")
        return {"prompt": side(raw.get(name), name), "tools": tools(raw)}
