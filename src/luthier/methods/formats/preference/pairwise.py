"""Two outputs and how far the second is preferred, from 1 (the first is better) to 2 (the second is)."""

from luthier.methods.formats._base import PAIRS, BadRow, Format, alike, instruction, numbers, side, text
from luthier.registry import row_format


@row_format(
    provides=[PAIRS],
    use_when="rows are AlpacaEval's comparisons, with two outputs and a preference between 1 and 2.",
)
class Pairwise(Format):
    """{"instruction": "...", "output_1": "...", "output_2": "...", "preference": 1.3}, as AlpacaEval writes
    them.

    The better one comes first; the scores are the shares of the preference, here [0.7, 0.3].
    """

    reading = "`output_1` beside `output_2`; `preference` tells which is better"
    objective = "dpo"
    columns = ("instruction output_1 output_2 preference", "prompt output_1 output_2 preference")
    optional = "input system history"

    def read(self, raw):
        if "instruction" in raw:
            prompt = instruction(raw)
        else:
            prompt = side(raw.get("prompt"), "prompt")
        second = numbers([raw.get("preference")], "preference")[0] - 1
        if second == 0.5:
            raise BadRow("preference is a tie")
        if not 0 <= second <= 1:
            raise BadRow("preference is not a number between 1 and 2")
        pair = sorted(
            ((1 - second, text(raw, "output_1")), (second, text(raw, "output_2"))), key=lambda p: -p[0]
        )
        prompt, completions = alike(prompt, *(c for _, c in pair))
        return {"prompt": prompt, "completions": completions, "scores": [s for s, _ in pair]}
