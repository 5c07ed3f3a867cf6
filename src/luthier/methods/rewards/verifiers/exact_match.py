"""1 where a text's answer (all of it, its last number, or what follows a marker) equals the row's `answer`,
else 0.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards._base import Reward
from luthier.registry import reward

# 1,234,567.5 and 1234567.5, .5, 1e-3; a minus counts as a sign unless it stands between two words, as in 3-5
NUMBER = re.compile(
    r"(?<![\w.)])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|[-+]?\.\d+|\d+(?:\.\d+)?"
)


@reward(
    requires=[ANSWER],
    use_when="answers are short or end in a number or after a marker: arithmetic, facts, GSM8K.",
    costs="a text comparison for each completion.",
)
class ExactMatch(Reward):
    """Compares the answer in the text with `answer`, which may be a list of answers that all count as right.

    The row's answers are parsed as the texts are, so `answer` may be a worked solution that ends in `####
    42`.
    """

    extract: Literal["none", "last_number", "after"] = "none"  # where the answer is in the text
    marker: str = "####"  # with extract: after, the answer is the rest of the line behind the last of these
    ignore_case: bool = False  # Paris = paris
    ignore_space: bool = True  # runs of white space count as one blank, none at the ends
    ignore_punctuation: bool = False  # ignore . , ; : ! ? quotes and brackets

    def __post_init__(self):
        if self.extract == "after" and not self.marker:
            raise ValueError("extract: `after` needs a marker, such as '####' or '=>'")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """1.0 or 0.0 per text."""
        right = self.column(row, "answer")
        right = {
            self.answer(str(a), gold=True) for a in (right if isinstance(right, (list, tuple)) else [right])
        }
        return [float(self.answer(text) in right - {None}) for text in texts]

    def answer(self, text: str, gold: bool = False) -> str | Decimal | None:
        """The answer that a text gives, in the form in which it is compared; None where it gives none."""
        if self.extract == "last_number":
            numbers = NUMBER.findall(text)
            try:
                return Decimal(numbers[-1].replace(",", "")) if numbers else None
            except ArithmeticError:  # an exponent beyond all
                return None
        if self.extract == "after":
            before, marker, rest = text.rpartition(self.marker)
            if not marker and not gold:
                return None
            text = (rest.strip().splitlines() or [""])[0] if marker else text
        if self.ignore_punctuation:
            text = re.sub(r"""[.,;:!?"'`()\[\]{}]""", "", text)
        if self.ignore_space:
            text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
