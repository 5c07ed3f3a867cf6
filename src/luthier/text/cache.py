"""Encoded rows kept in little space, so that a row is tokenized once."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict

from luthier.text.encoded import Encoded

# what decides how a prompt is encoded
COLUMNS = ("prompt", "prefix", "images", "audios", "tools", "chat_template_kwargs")
MOST = (1 << 31) - 1  # of a number in four bytes


def row_key(kind: str, row: dict) -> bytes:
    """A key of all that decides a row's encoding. kind: "row", or "prompt" without its completions."""
    content = [kind, *map(row.get, COLUMNS)]
    if kind == "row":
        content.append(row.get("completions"))
    text = json.dumps(content, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class EncodingCache:
    """Encodings by `row_key`; the oldest go when they hold more than max_tokens."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.tokens = 0
        self.entries: OrderedDict[bytes, tuple] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def store(self, key: bytes, encoded: Encoded) -> None:
        """Add an encoding as arrays: a list of Python numbers takes ten times the space."""
        prompt = compact(encoded.prompt)
        completions = [compact(completion) for completion in encoded.completions]
        supervised = list(map(bytes, encoded.supervised))
        self.entries[key] = (prompt, completions, supervised, encoded.scales)
        self.tokens += token_count(self.entries[key])
        while self.tokens > self.max_tokens and len(self.entries) > 1:
            _, oldest = self.entries.popitem(last=False)
            self.tokens -= token_count(oldest)

    def load(self, key: bytes) -> Encoded:
        """A stored encoding, as lists of its own."""
        prompt, completions, supervised, scales = self.entries[key]
        ids = [completion.tolist() for completion in completions]
        marks = [list(map(bool, flags)) for flags in supervised]
        return Encoded(prompt.tolist(), ids, marks, scales)


def compact(ids: list[int]) -> array:
    """Token ids in four bytes each; in eight where patches of images are among them."""
    return array("q" if max(ids, default=0) > MOST else "i", ids)


def token_count(entry: tuple) -> int:
    """Tokens of a stored encoding."""
    prompt, completions, *_ = entry
    return len(prompt) + sum(map(len, completions))
