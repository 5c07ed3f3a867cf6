"""Labels that are written one after another under a trie: only labels of a list, and none twice.

The tokens of the labels form a trie. Within a label the tokens are allowed with which one of the labels that
are left can still be written; behind a label the separator with another one, or the end. Among them the model
decides, so how often labels are written is what it has learned (Trie Search in Buchner et al., 2024). An
answer that is cut at `max_new_tokens` may end within a label.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.registry import decoder

Place = tuple[
    frozenset[int], int, int
]  # labels that are written, the one that is begun (-1: none), its tokens


@decoder(
    paper="arXiv:2309.12075",
    row="ptec",
    example={"labels": ["a", "b c"]},
    use_when="a language model writes several labels of a list, and must neither invent nor repeat one.",
    costs="a mask for each token.",
    covers="decoding over a trie of the labels that are left.",
    omits="labels in an order of their own: every order is allowed.",
    tests=["methods/decoders/rules/test_label_trie.py::test_no_label_is_invented_or_written_twice"],
)
class LabelTrie(Decoder):
    """Tokens of labels that are left, separators and the end."""

    labels: list[str]  # what may be written
    separator: str = ", "  # between labels
    before: str = " "  # what the answer begins with
    max_labels: Annotated[int, Field(ge=1)] | None = None  # labels of an answer at most; null: all

    def __post_init__(self):
        if not self.labels or len({*self.labels}) < len(self.labels) or not all(self.labels):
            raise RecipeError("decoder 'label_trie' needs labels, each once and none of them empty")
        if not self.separator.strip():
            raise RecipeError("decoder 'label_trie' needs a separator that is more than spaces")
        for label in self.labels:
            if self.separator.strip() in label:
                raise RecipeError(
                    f"decoder 'label_trie': label '{label}' contains the separator {self.separator!r}; choose"
                    " another one"
                )

    def begin(self, renderer):
        def tokens(text: str) -> list[int]:
            return renderer.tokenizer(text, add_special_tokens=False)["input_ids"]

        first = [tokens(self.before + label) for label in self.labels]
        later = [tokens(self.separator + label) for label in self.labels]
        trie = Trie(first, later, renderer.stop_ids, self.max_labels or len(self.labels))

        def adjust(logits, prompts, responses):
            for row, response in enumerate(responses):
                allowed = torch.tensor(sorted(trie.allowed(response)), device=logits.device)
                chosen = logits[row, allowed].clone()
                logits[row] = -torch.inf
                logits[row, allowed] = chosen
            return logits

        return adjust


class Trie:
    """Labels as tokens, as they stand first and behind a separator; which tokens may follow others."""

    def __init__(
        self, first: Sequence[list[int]], later: Sequence[list[int]], ends: Collection[int], most: int
    ):
        self.first, self.later, self.ends = first, later, set(ends)
        self.most = min(most, len(first))

    def form(self, written: frozenset[int], label: int) -> list[int]:
        return self.later[label] if written else self.first[label]

    def allowed(self, response: Sequence[int]) -> set[int]:
        """The tokens that may follow a response; where it has ended, or is none, the ends."""
        places: set[Place] = {(frozenset(), -1, 0)}
        for token in response:
            places = {place for own in places for place in self.after(own, token)}
        following = set()
        for place in places:
            following |= self.next_tokens(place)
        return following or self.ends

    def begun(self, written: frozenset[int]) -> list[int]:
        """The labels with which an answer can go on."""
        if len(written) >= self.most:
            return []
        return [label for label in range(len(self.first)) if label not in written]

    def next_tokens(self, place: Place) -> set[int]:
        written, label, size = place
        if label >= 0:
            return {self.form(written, label)[size]}
        following = {self.form(written, other)[0] for other in self.begun(written)}
        return following | self.ends if written else following

    def after(self, place: Place, token: int) -> list[Place]:
        """Where a place leads with one more token; nowhere where it does not fit."""
        written, label, size = place
        labels = [label] if label >= 0 else self.begun(written)
        places: list[Place] = []
        for other in labels:
            own = self.form(written, other)
            if own[size] != token:
                continue
            if size + 1 == len(own):
                places.append((written | {other}, -1, 0))
            else:
                places.append((written, other, size + 1))
        return places
