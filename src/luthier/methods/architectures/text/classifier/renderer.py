"""Rows to tokens for classifiers: the prompt as an encoder reads it, and the index of each
completion's class.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.formats._base import BadRow
from luthier.registry import did_you_mean
from luthier.text.encode import Encoded, Renderer
from luthier.text.verify import check_media


class LabelRenderer(Renderer):
    """A Renderer whose completions are classes. Rows with two `texts` go through the tokenizer as a pair."""

    def __init__(self, tokenizer: Any, label2id: dict[str, int], **how: Any):
        super().__init__(tokenizer, encoder=True, **how)
        self.label2id = label2id

    def encode_batch(self, rows: list[dict]) -> list[Encoded | BadRow]:
        return [self._class(row) for row in rows]

    def _class(self, row: dict) -> Encoded | BadRow:
        try:
            check_media(row)
            classes = [[class_of(c, self.label2id)] for c in row.get("completions", [])]
            # the line break that parts a text from its label has no label after it here
            prompt = row["prompt"]
            row = {**row, "prompt": prompt.removesuffix("\n") if isinstance(prompt, str) else prompt}
            ids = (
                self.tokenizer(*row["texts"])["input_ids"]
                if len(row.get("texts", ())) == 2
                else self.encode_structured({**row, "completions": []}).prompt
            )
            encoded = Encoded(ids, classes, [[True]] * len(classes))
            if not ids:
                raise BadRow("the text is empty")
            if self.max_length:
                self.shorten(encoded, self.max_length)
            self.check_vocabulary(Encoded(ids, [], []))
            return encoded
        except ValueError as why:  # BadRow is one
            return why if isinstance(why, BadRow) else BadRow(str(why))

    def decode_marked(self, row: dict, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
        """For people: the text as it is read, then the names of its classes between marks."""
        encoded, names = self.encode(row), {i: name for name, i in self.label2id.items()}
        labels = "\n---\n".join(f"{marks[0]}{names[ids[0]]}{marks[1]}" for ids in encoded.completions)
        return f"{self.text(encoded.prompt, special=True)} → {labels}"

    def prompt(self, row: dict) -> list[int]:
        encoded = self._class({**row, "completions": []})
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded.prompt


def class_of(name: Any, label2id: dict[str, int]) -> int:
    """A class's index. Raises ValueError with the nearest name."""
    if not isinstance(name, str):
        raise ValueError("a completion is not a class name")
    if name not in label2id:
        raise ValueError(f"'{name}' is not one of the classes{did_you_mean(name, label2id)}")
    return label2id[name]
