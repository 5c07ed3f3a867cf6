"""Texts without punctuation and case beside clean ones, so that where a sentence ends is not read off them
(Segment Any Text).

`share` of the texts (drawn from seed and row) lose all punctuation and capitals, as a tenth of the chunks in
the paper's pretraining; of every other each mark leaves with probability `drop`. With `copies` the row stays
as it is and a copy of each named kind follows it, as in the paper's tuning on sentences: `asr` has neither
punctuation nor case, `social` has lower case and marks that are left out or repeated. Line breaks, which
architecture `segmenter` predicts, stay. Departs: chunks are rows; what the paper does to texts of social
media beyond case and marks is not done.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    paper="arXiv:2406.16678",
    requires=[COMPLETIONS],
    use_when="a segmenter is to cut transcripts and chat, too, where punctuation and case are missing.",
    costs="nothing; with `copies`, epochs grow by the copies.",
)
class SentenceNoise(Stage):
    """Rows of `text` with noise; other rows stay as they are."""

    asks_model = False

    share: Annotated[float, Field(ge=0, le=1)] = 0.1  # of texts that lose all punctuation and case
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability with which other texts lose a mark
    copies: tuple[Literal["asr", "social"], ...] = ()  # kinds that follow every text, which stays clean

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        answered = [row for row in rows if row.get("completions")]
        self.left(roles, len(rows) - len(answered), len(rows), "they have no text")
        for row in answered:
            texts = row["completions"]
            if row["prompt"] != "" or len(texts) != 1 or not isinstance(texts[0], str):
                out.append(row)
                continue
            rng = roles.clock.rng(self.name, row["id"], at=0)
            if not self.copies:
                out.append({**row, "completions": [self.noised(texts[0], rng)]})
                continue
            out.append(row)
            for kind in self.copies:
                text = bare(texts[0]) if kind == "asr" else social(texts[0], rng)
                out.append({**row, "id": f"{row['id']}/{kind}", "completions": [text]})
        return out

    def noised(self, text: str, rng: torch.Generator) -> str:
        if float(torch.rand((), generator=rng)) < self.share:
            return bare(text)
        if not self.drop:
            return text
        letters = []
        for letter in text:
            if not is_mark(letter) or float(torch.rand((), generator=rng)) >= self.drop:
                letters.append(letter)
        return "".join(letters)


def is_mark(letter: str) -> bool:
    """Is it punctuation, of any script?"""
    return unicodedata.category(letter).startswith("P")


def bare(text: str) -> str:
    """A text without punctuation and case; a text of marks alone stays."""
    lines = []
    for line in text.splitlines():
        words = "".join(letter for letter in line if not is_mark(letter)).lower().split()
        lines.append(" ".join(words) if words else line)
    return "\n".join(lines)


def social(text: str, rng: torch.Generator) -> str:
    """A text in lower case, whose marks are there as before, missing or several, equally often."""
    letters = []
    for letter in text.lower():
        times = int(torch.randint(3, (), generator=rng)) if is_mark(letter) else 1
        letters.append(letter * times)
    return "".join(letters)
