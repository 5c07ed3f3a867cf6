"""Rows to tokens for classifiers: the prompt as an encoder reads it, and the index of each
completion's class.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.architectures.text.classifier.heads import REGRESSION, SINGLE, numbers_of
from luthier.methods.architectures.text.classifier.labels import names_of_row
from luthier.methods.formats._base import BadRow
from luthier.registry import did_you_mean
from luthier.text.encode import Encoded, Renderer


class LabelRenderer(Renderer):
    """A Renderer whose completions are classes. Rows with two `texts` go through the tokenizer as a pair.

    Of several labels a completion is no or yes (0 or 1) for each; in a regression it counts the numbers.
    """

    def __init__(
        self,
        tokenizer: Any,
        label2id: dict[str, int],
        problem: str = SINGLE,
        class_weights: dict[str, float] | None = None,
        **how: Any,
    ):
        super().__init__(tokenizer, encoder=True, **how)
        self.label2id, self.problem, self.class_weights = label2id, problem, class_weights

    def encode_batch(self, rows: list[dict]) -> list[Encoded | BadRow]:
        return [self._class(row) for row in rows]

    def _class(self, row: dict) -> Encoded | BadRow:
        try:
            self.check_media(row)
            classes = self.targets(row)
            ids = self.input_ids(row)
            encoded = Encoded(ids, classes, [[True] * len(c) for c in classes], self.weights(classes))
            if not ids:
                raise BadRow("the text is empty")
            if self.max_length:  # of the text alone: labels are not cut
                text = Encoded(ids, [], [])
                self.shorten(text, self.max_length)
                encoded.prompt = text.prompt
            self.check_vocabulary(Encoded(ids, [], []))
            return encoded
        except ValueError as why:  # BadRow is one
            return why if isinstance(why, BadRow) else BadRow(str(why))

    def input_ids(self, row: dict) -> list[int]:
        """What the network reads of a row. Raises BadRow."""
        # the line break that parts a text from its label has no label after it here
        prompt = row["prompt"]
        row = {**row, "prompt": prompt.removesuffix("\n") if isinstance(prompt, str) else prompt}
        if len(row.get("texts", ())) == 2:
            return self.tokenizer(*row["texts"])["input_ids"]
        return self.encode_structured({**row, "completions": []}).prompt

    def targets(self, row: dict) -> list[list[int]]:
        """Of each completion of a row, what its places are to be. Raises ValueError where a label is none."""
        completions = row.get("completions", [])
        if self.problem == SINGLE:
            return [[class_of(c, self.label2id)] for c in completions]
        if not completions:
            return []
        if self.problem == REGRESSION:
            numbers = numbers_of(row)
            if len(numbers) != len(self.label2id):
                raise ValueError(f"the row has {len(numbers)} numbers and the head {len(self.label2id)}")
            return [list(range(len(numbers)))]
        marks = [0] * len(self.label2id)
        for name in names_of_row(row, self.label2id):
            marks[class_of(name, self.label2id)] = 1
        return [marks]

    def weights(self, classes: list[list[int]]) -> list[list[float]] | None:
        """How much each place counts; None where all count alike."""
        if self.class_weights is None:
            return None
        by_id = [self.class_weights[name] for name in sorted(self.label2id, key=self.label2id.__getitem__)]
        if self.problem == SINGLE:
            return [[by_id[i] for i in places] for places in classes]
        return [[by_id[i] if mark else 1.0 for i, mark in enumerate(marks)] for marks in classes]

    def decode_marked(self, row: dict, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
        """For people: the text as it is read, then the names of its classes between marks."""
        encoded, names = self.encode(row), {i: name for name, i in self.label2id.items()}
        if self.problem == SINGLE:
            every = [names[ids[0]] for ids in encoded.completions]
        elif self.problem == REGRESSION:
            every = [", ".join(map(str, numbers_of(row)))]
        else:
            every = [", ".join(names_of_row(row, self.label2id))]
        labels = "\n---\n".join(f"{marks[0]}{label}{marks[1]}" for label in every)
        return f"{self.text(encoded.prompt, special=True)} → {labels}"

    def any_answer(self, row):
        return min(self.label2id, key=self.label2id.__getitem__)

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
