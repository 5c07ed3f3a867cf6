"""Text as it is written, token by token: whole characters, up to a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.text.encode import Renderer

BROKEN = "\ufffd"  # how tokenizers write bytes that are no character, or not yet
LONGEST_CHARACTER = 8  # tokens after which broken bytes are written as they are


class TextStream:
    """The text of one sequence. What comes of all its tokens is what `Renderer.answer` makes of them."""

    def __init__(self, renderer: Renderer, stop: Sequence[str] = (), special: bool = False):
        """stop: texts at which it ends; they are left out. special: special tokens are written, too."""
        self.renderer, self.special = renderer, special
        self.stop = [text for text in stop if text]
        self.ids: list[int] = []
        # tokens from `start` on are decoded together, since a token's text may depend on those before it;
        # the text of those before `written` is in `pending` or was handed out
        self.start = self.written = 0
        self.pending = ""
        self.stopped = False
        # what the template writes before a reply's text (the name of a channel): nothing is text before it
        self.opening: list[int] = [] if special else renderer.reply_opening

    def add(self, token: int) -> str:
        """A further token: the text that is certain now."""
        self.ids.append(token)
        if self.opening:
            if self.ids[-len(self.opening) :] != self.opening:
                return ""
            self.ids, self.opening = [], []
            return ""
        return self.advance(final=False)

    def end(self) -> str:
        """No token comes after this: the text that was not certain."""
        return self.advance(final=True)

    def advance(self, final: bool) -> str:
        """Decode what is new, and hand out what no stop sequence can begin in."""
        if self.stopped:
            return ""
        before = self.renderer.text(self.ids[self.start : self.written], special=self.special)
        text = self.renderer.text(self.ids[self.start :], special=self.special)
        whole = not text.endswith(BROKEN) or len(self.ids) - self.written >= LONGEST_CHARACTER
        if final or whole:
            self.pending += text[len(before) :]
            self.start, self.written = self.written, len(self.ids)
        place = first_of(self.pending, self.stop)
        if place is not None:
            self.stopped = True
            text, self.pending = self.pending[:place], ""
            return text
        certain = len(self.pending)
        if not final:
            certain -= longest_beginning(self.pending, self.stop)
        text, self.pending = self.pending[:certain], self.pending[certain:]
        return text


def first_of(text: str, sought: Sequence[str]) -> int | None:
    """Where the first of some texts begins in another; None where none is in it."""
    places = [text.find(each) for each in sought]
    return min((place for place in places if place >= 0), default=None)


def longest_beginning(text: str, sought: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the others."""
    longest = 0
    for each in sought:
        for size in range(min(len(each) - 1, len(text)), longest, -1):
            if text.endswith(each[:size]):
                longest = size
                break
    return longest
