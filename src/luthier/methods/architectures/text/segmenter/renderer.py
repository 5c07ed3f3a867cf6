"""Texts to tokens for segmenters: the text without its line breaks, and for every token whether one followed
it.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.formats._base import BadRow
from luthier.text.cache import row_key
from luthier.text.encode import Renderer, is_text
from luthier.text.encoded import Encoded

LABELS = ("inside", "end")


class SegmentRenderer(Renderer):
    """A Renderer whose prompts are texts without line breaks, and whose completion is a mark for each token:
    1 where a line ends with it. Not asked are what the tokenizer adds and the last token of a text.

    separator: what a line break is replaced by.
    """

    problem = "single_label_classification"
    label2id = {name: i for i, name in enumerate(LABELS)}

    def __init__(self, tokenizer: Any, separator: str = " ", **how: Any):
        super().__init__(tokenizer, encoder=True, **how)
        self.separator = separator
        self.note = None  # there is no chat template to speak of

    def encode_batch(self, rows: list[dict]) -> list[Encoded | BadRow]:
        outcomes: list[Encoded | BadRow] = []
        for row in rows:
            key = row_key("row", row)
            try:
                if key not in self.cache:
                    self.cache.store(key, self.marked(row))
                outcomes.append(self.cache.load(key))
            except BadRow as why:
                outcomes.append(why)
        return outcomes

    def marked(self, row: dict) -> Encoded:
        """Tokens and marks of a row. Raises BadRow."""
        self.check_media(row)
        if not is_text(row):
            raise BadRow("a segmenter reads rows of `text` alone, whose line breaks it predicts")
        text, ends = without_breaks(row["completions"][0], self.separator)
        ids, spans = self.tokens(text)
        if len(ids) < 2:
            raise BadRow("the text has fewer than two tokens, so there is no end of a line to predict")
        marks = marks_of(spans, ends)
        before, after = len(self.prefix), len(self.suffix)
        whole = [*self.prefix, *ids, *self.suffix]
        completion = [0] * before + marks + [0] * after
        supervised = [False] * before + [True] * (len(ids) - 1) + [False] * (1 + after)
        encoded = Encoded(whole, [completion], [supervised])
        self.check_vocabulary(Encoded(whole, [], []))
        return encoded

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text without what the tokenizer adds, and the characters [start, end) of each. Raises
        BadRow.
        """
        if not self.tokenizer.is_fast:
            raise BadRow("a segmenter needs a fast tokenizer, which says which characters a token stands for")
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["input_ids"], [tuple(span) for span in encoding["offset_mapping"]]

    def split_long(self, rows: list[dict]) -> list[dict]:
        """Texts of more than max_length tokens in consecutive pieces (x#0, x#1, ...)."""
        if not self.max_length:
            return rows
        out: list[dict] = []
        for row in rows:
            if not is_text(row) or not self.tokenizer.is_fast:
                out.append(row)  # what is wrong with it is said when it is encoded
                continue
            parts = self.parts_of(row["completions"][0], self.max_length)
            if len(parts) == 1:
                out.append(row)
                continue
            self.pieces += len(parts)
            for k, part in enumerate(parts):
                out.append({**row, "id": f"{row.get('id', '')}#{k}", "completions": [part]})
        return out

    def parts_of(self, text: str, most: int) -> list[str]:
        """A text in parts of at most `most` tokens each, with their line breaks; all of it where it fits.
        What follows the last token of a text is not predicted, so a part begins with the last one of the
        part before it: every token counts once.
        """
        joined, ends = without_breaks(text, self.separator)
        _, spans = self.tokens(joined)
        room = max(2, most - len(self.prefix) - len(self.suffix))
        if len(spans) <= room:
            return [text]
        parts, start, stop = [], 0, 0
        while stop < len(spans):
            stop = min(start + room, len(spans))
            first, last = spans[start][0], spans[stop - 1][1]
            inner = [end - first for end in ends if first < end < last]
            parts.append(with_breaks(joined[first:last], inner, self.separator))
            start = self.last_word(joined, spans, start, stop)
        return parts

    def last_word(self, text: str, spans: list[tuple[int, int]], start: int, stop: int) -> int:
        """The last of the tokens start + 1 to stop - 1 that is no space: a part's last spaces are lost."""
        for k in range(stop - 1, start, -1):
            if text[slice(*spans[k])].strip():
                return k
        return stop - 1

    def prompt(self, row: dict) -> list[int]:
        return self.encode(row).prompt

    def decode_marked(self, row: dict, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
        """For people: the text as it is read, a mark behind every line."""
        text, ends = without_breaks(row["completions"][0], self.separator)
        return with_breaks(text, ends, self.separator, f"{marks[0]}end{marks[1]}{self.separator}")


def without_breaks(text: str, separator: str = " ") -> tuple[str, list[int]]:
    """A text's lines joined, and where all but the last end: places [1, len) of what was joined."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    ends, size = [], 0
    for line in lines[:-1]:
        size += len(line)
        ends.append(size)
        size += len(separator)
    return separator.join(lines), ends


def with_breaks(text: str, ends: list[int], separator: str = " ", mark: str = "\n") -> str:
    """The way back: a mark in the place of the separators at these ends."""
    parts, start = [], 0
    for end in ends:
        parts.append(text[start:end])
        start = end + len(separator)
    return mark.join([*parts, text[start:]])


def marks_of(spans: list[tuple[int, int]], ends: list[int]) -> list[int]:
    """For every token, 1 where a line ends within it or with it, else 0."""
    last = {end - 1 for end in ends}
    marks = []
    for start, stop in spans:
        marks.append(int(not last.isdisjoint(range(start, stop))))
    return marks
