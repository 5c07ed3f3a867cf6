"""A text of the row joins its completions: a person's program, or the right answer, among samples.

So a ranking has something good in it while the policy's own samples are all bad (PerfRL adds the fast program
that a row comes with to what the network writes).
"""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, Stage, without
from luthier.registry import stage


@stage(
    paper="arXiv:2312.05657",
    requires=[COMPLETIONS],
    removes=[PAIRS, SCORES, OLD_LOGPROBS, CACHED_LOGPROBS],
    use_when="samples are to be ranked beside an answer that is known to be good.",
    costs="one more completion a row.",
)
class AddColumn(Stage):
    """completions = [the row's completions, its text in `column`]. Rows without the text, or that have
    it already, stay as they are.
    """

    asks_model = False

    column: str = "answer"  # name of the column whose text joins the completions
    before: str = ""  # put before the text, where completions begin with it

    def __call__(self, rows, roles):
        out = []
        for row in rows:
            text = row.get(self.column)
            completions = list(row["completions"])
            if isinstance(text, str) and text and self.before + text not in completions:
                completions.append(self.before + text)
            out.append({**without(row), "completions": completions})
        return out
