"""The recipe's key `add_tokens`: tokens that the tokenizer gains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import RecipeError, quoted
from luthier.registry import did_you_mean

TRAIN = ("auto", "new", "all")
FORM = "a list of tokens, or {tokens: [...], special: true, train: new}"
MOST = 10**6  # tokens of one range: a slip of the hand would fill the memory


@dataclass(frozen=True)
class NewTokens:
    """tokens: in the order of their ids. special: are they control tokens, which decoding leaves out? train:
    `new` rows of the embeddings alone, `all` of them, or what fits the tuner.
    """

    tokens: tuple[str, ...]
    special: bool = False
    train: str = "auto"


def read_new_tokens(value: Any) -> NewTokens | None:
    """What a recipe says under `add_tokens`; None where it adds none. Raises RecipeError."""
    if value is None or value == []:
        return None
    if isinstance(value, str):
        value = [value]
    settings = dict(value) if isinstance(value, Mapping) else {"tokens": value}
    for key in settings:
        if key not in ("tokens", "special", "train"):
            hint = did_you_mean(str(key), ["tokens", "special", "train"])
            raise RecipeError(f"add_tokens: there is no setting {quoted(key)}{hint}")
    tokens = settings.get("tokens")
    if not isinstance(tokens, (list, tuple)) or not tokens:
        raise RecipeError(f"add_tokens: expected {FORM}, not {quoted(value)}")
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise RecipeError(f"add_tokens: a token is a text that is not empty, not {quoted(token)}")
    tokens = [one for token in tokens for one in in_range(token)]
    if len(set(tokens)) < len(tokens):
        raise RecipeError("add_tokens: a token is listed twice")
    special, train = settings.get("special", False), settings.get("train", "auto")
    if not isinstance(special, bool):
        raise RecipeError(f"add_tokens: special is true or false, not {quoted(special)}")
    if train not in TRAIN:
        raise RecipeError(f"add_tokens: train is one of {', '.join(TRAIN)}, not {quoted(train)}")
    return NewTokens(tuple(tokens), special, train)


def in_range(token: str) -> list[str]:
    """`<code_{0..2}>` -> `<code_0>`, `<code_1>`, `<code_2>`; any other token alone. Raises RecipeError."""
    match = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", token)
    if match is None:
        return [token]
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise RecipeError(f"add_tokens: {quoted(token)} counts from {first} to {last}, which is no token")
    if last - first >= MOST:
        raise RecipeError(f"add_tokens: {quoted(token)} is {last - first + 1:,} tokens; {MOST:,} at most")
    before, behind = token[: match.start()], token[match.end() :]
    return [f"{before}{number}{behind}" for number in range(first, last + 1)]
