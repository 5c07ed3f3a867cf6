"""Leaves out rows that share a long run of words with a test set.

A row is contaminated where one run of `words` words in lower case, without punctuation, also stands in a
row of the test set: 13 in GPT-3's report (Brown et al., 2020, arXiv:2005.14165), fewer for short texts.
Test texts shorter than the run count as one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.data.load import load_rows
from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import question, texts_of
from luthier.methods.stages.select.deduplicate import WORD, shingles
from luthier.registry import stage

SHORT = 5  # words from which a whole test text inside a row counts


@stage(
    example={"against": "toy:people"},
    paper="arXiv:2005.14165",
    use_when="a benchmark or your own test rows must not be learned from.",
    costs="a set of all runs of words of the test rows.",
)
class Decontaminate(Stage):
    """Rows without a run of words of the test rows."""

    asks_model = False

    against: Any = "toy:people"  # the test rows: a file, several files, or rows
    words: Annotated[int, Field(ge=1)] = 13  # of a run
    part: Literal["prompt", "row"] = "prompt"  # of the test rows: their prompts, or the answers as well

    def __call__(self, rows, roles):
        rows = list(rows)
        sources = self.against
        if not isinstance(sources, list) or sources and isinstance(sources[0], dict):
            sources = [sources]
        runs: set[str] = set()
        for source in sources:
            for text in texts_of(roles, load_rows(source).rows, self.part):
                runs |= shingles(text, self.words)
        short = {run for run in runs if len(run.split()) < self.words}
        chosen = []
        for place, text in enumerate(texts_of(roles, rows, "row")):
            own = shingles(text, self.words)
            if not own & runs and not self.holds(text, question(rows[place]), short):
                chosen.append(place)
        return self.drop(roles, rows, chosen, "they share a run of words with the test rows")

    def holds(self, text: str, prompt: str, short: set[str]) -> bool:
        """Is the prompt one of the short test texts, or does the text hold one that is long enough?"""
        if " ".join(WORD.findall(prompt.lower())) in short:
            return True
        words = " ".join(WORD.findall(text.lower()))
        return any(len(run.split()) >= SHORT and f" {run} " in f" {words} " for run in short)
