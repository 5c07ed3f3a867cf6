"""Findings: of the statements that a reference or a text makes, the share that both make.

matched / (matched + missing + false): 1 for a text that states all of the reference and nothing else, in any
order. Statements are what full stops, semicolons and line breaks divide; two are the same where their words
are, in the same order. It stands in for a judge that reads reports against a reference (the GREEN score:
matched findings over these and significant errors); it knows no synonyms and does not weigh errors, for which
a language model is asked in a reward of one's own.
"""

from __future__ import annotations

import re

from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards._base import Reward
from luthier.registry import reward

WORDS = re.compile(r"\w+")


@reward(
    paper="arXiv:2410.07025",
    row="cxr-preference",
    requires=[ANSWER],
    use_when="answers are lists of statements and `answer` is a reference with all that should be stated:"
    " reports, checklists, summaries of facts.",
    costs="a text comparison for each completion.",
    covers="a judge of texts against a reference, by rule.",
    omits="the paper's judge, a language model that counts clinically significant errors.",
    tests=["methods/rewards/verifiers/test_findings.py::test_shares_of_statements"],
)
class Findings(Reward):
    """The share of statements that a text has in common with `answer`."""

    divide: str = r"[.;\n]+"  # regular expression of what stands between two statements

    def __post_init__(self):
        try:
            re.compile(self.divide)
        except re.error as error:
            raise ValueError(f"divide: {error}") from None

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """From 0 to 1 per text."""
        reference = self.statements(str(self.column(row, "answer")))
        scores = []
        for text in texts:
            stated = self.statements(text)
            either = reference | stated
            scores.append(len(reference & stated) / len(either) if either else 1.0)
        return scores

    def statements(self, text: str) -> set[tuple[str, ...]]:
        """Each statement as its words, in lower case."""
        parts = (tuple(WORDS.findall(part.lower())) for part in re.split(self.divide, text))
        return {words for words in parts if words}
