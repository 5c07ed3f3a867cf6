"""Alpaca rows: an instruction, optionally an input, and the output to train on; optionally a system prompt
and a history.
"""

from luthier.methods.formats._base import COMPLETIONS, Format, alike, instruction, text
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows have `instruction` and `output`, perhaps `input`. It is recognised by these columns.",
)
class Alpaca(Format):
    """{"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "...", "history": [["Hi",
    "Hello"]]}.

    Always read as a conversation, so that training and inference use the chat template.
    """

    reading = "`output` answers `instruction`"
    columns = ("instruction output",)
    optional = "input system history"

    def read(self, raw):
        prompt, completions = alike(instruction(raw), text(raw, "output"))
        return {"prompt": prompt, "completions": completions}
