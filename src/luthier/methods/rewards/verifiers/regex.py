"""1 where a text matches a regular expression, else 0."""

from __future__ import annotations

import re

from luthier.methods.rewards._base import Reward
from luthier.registry import reward
from luthier.sandbox import limits


@reward(
    use_when="what is right can be seen by a pattern: a date, a code, a word that must or must not occur.",
    costs="a search in each completion; a pattern with repeats within repeats can take very long.",
)
class Regex(Reward):
    """Searches the end of the text, up to 20,000 characters, or compares all of it (`whole`)."""

    pattern: str  # regular expression of Python
    whole: bool = False  # the whole text must match, white space at its ends aside
    absent: bool = False  # 1 where the pattern does not occur
    ignore_case: bool = False  # a = A
    dotall: bool = True  # a dot also stands for a line break

    def __post_init__(self):
        try:
            self.compiled()
        except re.error as error:
            raise ValueError(f"pattern: {error}") from None

    def compiled(self) -> re.Pattern[str]:
        flags = re.NOFLAG if hasattr(re, "NOFLAG") else re.RegexFlag(0)
        if self.ignore_case:
            flags |= re.IGNORECASE
        if self.dotall:
            flags |= re.DOTALL
        return re.compile(self.pattern, flags)

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """1.0 or 0.0 per text."""
        pattern, scores = self.compiled(), []
        for text in texts:
            match = pattern.fullmatch(text.strip()) if self.whole else pattern.search(text[-limits.ANSWER :])
            scores.append(float((match is None) == self.absent))
        return scores
