"""Texts to token ids: calls of the tokenizer, and what it adds by itself."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from luthier.methods.formats._base import BadRow
from luthier.text.chat import MARK

MARKED = re.compile(f"[^{MARK}]{MARK}[^{MARK}]*{MARK}|{MARK}")  # a special token that is text (Chat.marked)


def tokenize_all(tokenizer: Any, texts: list[str], special: bool) -> list[list[int] | BadRow]:
    """Token ids of texts; a text that the tokenizer refuses does not take the others with it. special: with
    the special tokens that the tokenizer adds.
    """
    if not texts:
        return []
    try:
        return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    except (TypeError, ValueError, OverflowError) as why:
        if len(texts) == 1:
            return [BadRow(f"the tokenizer raised an error: {why}")]
        return [tokenize_all(tokenizer, [text], special)[0] for text in texts]


def tokenize(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids of one text. Raises BadRow."""
    ids = tokenize_all(tokenizer, [text], special)[0]
    if isinstance(ids, BadRow):
        raise ids
    return ids


def tokenize_with_offsets(
    tokenizer: Any, text: str, cuts: Collection[int], apart: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """(token ids, the characters [start, end) that each stands for) of rendered text. apart: the parts
    between `cuts` are encoded one by one.
    """
    bounds = {0, len(text)}
    # A slow tokenizer does not tell which characters a token stands for, so it always works in parts.
    if apart or not tokenizer.is_fast:
        bounds.update(cuts)
    literal: set[int] = set()  # where a part begins whose special tokens are text
    if MARK in text:
        for match in MARKED.finditer(text):
            literal.add(match.start())
            bounds.update(match.span())
    borders = sorted(bounds)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, stop in zip(borders, borders[1:], strict=False):
        part = text[start:stop]
        how: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        if start in literal:
            part = part.replace(MARK, "")
            how["split_special_tokens"] = True
        if tokenizer.is_fast and start not in literal:
            encoding = tokenizer(part, return_offsets_mapping=True, **how)
            ids += encoding["input_ids"]
            offsets += [(a + start, b + start) for a, b in encoding["offset_mapping"]]
        elif part:
            part_ids = tokenizer(part, **how)["input_ids"]
            ids += part_ids
            offsets += [(start, stop)] * len(part_ids)
    return ids, offsets


def tokenize_marked(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text. Raises BadRow."""
    if MARK not in text:
        return tokenize(tokenizer, text)
    return tokenize_with_offsets(tokenizer, text, ())[0]


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts (before, after) a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        stop = start + len(bare)
        if whole[start:stop] == bare:
            return whole[:start], whole[stop:]
    return whole, []
