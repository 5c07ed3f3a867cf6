"""Two continuations of the same first steps, one better: preferences step by step."""

from luthier.methods.formats._base import PAIRS, BadRow, Format, first_of, side, text
from luthier.registry import row_format


@row_format(
    provides=[PAIRS],
    use_when="rows share first steps of a solution and then continue in a better and a worse way (Step-DPO).",
)
class StepPreference(Format):
    """{"prompt": "2+2*3?", "prefix": "2*3=6\\n", "chosen": "2+6=8", "rejected": "2+6=9"}; prefix may be
    `initial_reason_steps`.

    The prefix is read as the beginning of the reply, and not learned.
    """

    reading = "`chosen` is the better next step, `rejected` the worse one"
    objective = "dpo"
    columns = ("prompt prefix chosen rejected", "prompt initial_reason_steps chosen rejected")

    def read(self, raw):
        name = first_of(raw, ("prefix",), "initial_reason_steps")
        chosen, rejected = text(raw, "chosen"), text(raw, "rejected")
        if chosen == rejected:
            raise BadRow("chosen and rejected are the same")
        prompt = side(raw.get("prompt"), "prompt")
        return {
            "prompt": prompt,
            "prefix": text(raw, name, empty=True),
            "completions": [chosen, rejected],
            "scores": [1.0, 0.0],
        }
