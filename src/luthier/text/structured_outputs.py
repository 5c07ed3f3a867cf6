"""Texts of a required form: a JSON schema, a regular expression, one of several texts, or a grammar.

Before each token, those that could not lead to such a text are forbidden. Automata and their masks are
llguidance's (an optional package); here its grammars are built, checked, and followed for each sequence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import RecipeError, shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# JSON is on one line, as json.dumps writes it or without spaces: small models would go on with white space
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True)
class Structure:
    """What a text must be, as llguidance writes it. Texts of one structure may share a `Vocabulary`."""

    grammar: str


@dataclass(frozen=True)
class Until:
    """Any text, up to another one and with it."""

    end: str


def structure(
    json: Any = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    grammar: str | None = None,
) -> Structure:
    """The structure of a text; exactly one is to be said.

    Args:
        json: a JSON schema as a mapping or as JSON text; {"type": "object"} is any JSON object.
        regex: a regular expression that the whole text matches.
        choice: the text is one of these.
        grammar: in Lark's syntax, with a rule `start`.

    Raises:
        RecipeError: none or several are said, the schema is not JSON, or llguidance is not installed.
    """
    options = {"json": json, "regex": regex, "choice": choice, "grammar": grammar}
    chosen = [name for name, value in options.items() if value is not None]
    if len(chosen) != 1:
        raise RecipeError(f"say one of json, regex, choice and grammar, not {' and '.join(chosen) or 'none'}")
    matcher = _llguidance().LLMatcher
    if json is not None:
        return Structure(matcher.grammar_from_json_schema(_schema(json), overrides=ONE_LINE))
    if regex is not None:
        return Structure(matcher.grammar_from_regex(regex))
    if choice is not None:
        return Structure(_lark_of_choices(choice))
    return Structure(str(grammar))


def _schema(schema: Any) -> Any:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as why:
            raise RecipeError(f"json: not a JSON schema: {why}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise RecipeError("json: expected a JSON schema, such as {type: object, properties: {...}}")
    return schema


def _lark_of_choices(choice: Sequence[str]) -> str:
    if isinstance(choice, str) or not choice or not all(isinstance(text, str) and text for text in choice):
        raise RecipeError("choice: expected a list of texts, e.g. [positive, negative]")
    return "start: " + " | ".join(literal(text) for text in choice)


def json_within(before: str, schema: Mapping[str, Any], after: str, tokenizer: Any) -> Structure:
    """JSON of a schema between two texts, in which a tokenizer's special tokens are tokens."""
    return one_of([[before, schema, after]], tokenizer)


def one_of(alternatives: Sequence[Sequence[Any]], tokenizer: Any) -> Structure:
    """One of several sequences of parts. A part is a text, in which a tokenizer's special tokens are tokens;
    a mapping, a JSON schema; `Until`, any text that ends with another; or a list, parts that may be left out.
    """
    special = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special[token.content] = number
    rules: list[str] = []
    choices = [_sequence(parts, special, rules) for parts in alternatives]
    return Structure("\n".join([f"start: {' | '.join(choices)}", *rules]))


def _sequence(parts: Sequence[Any], special: Mapping[str, int], rules: list[str]) -> str:
    """Parts as a Lark grammar writes them. Rules that they need are added to `rules`."""
    words = []
    for part in parts:
        if isinstance(part, str):
            words += _with_tokens(part, special)
        elif isinstance(part, Until):
            rules.append(f"part_{len(rules)}[suffix={literal(part.end)}]: /(?s:.*)/")
            words.append(f"part_{len(rules) - 1}")
        elif isinstance(part, Mapping):
            schema = json.dumps({"x-guidance": ONE_LINE, **part}, ensure_ascii=False)
            rules.append(f"part_{len(rules)}: %json {schema}")
            words.append(f"part_{len(rules) - 1}")
        else:
            words.append(f"({_sequence(part, special, rules)})?")
    return " ".join(words)


def _with_tokens(text: str, special: Mapping[str, int]) -> list[str]:
    """The parts of a text in a Lark grammar: a special token by its number, all else literally."""
    if not special:
        return [literal(text)] if text else []
    pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    return [f"<[{special[piece]}]>" if piece in special else literal(piece) for piece in pieces if piece]


def literal(text: str) -> str:
    """A text in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _llguidance() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ModuleNotFoundError:
        raise RecipeError(
            "structured outputs need llguidance, which is not installed: pip install llguidance"
        ) from None
    return llguidance


class Vocabulary:
    """The tokens of a tokenizer, as llguidance reads them; made once, since large ones take seconds."""

    def __init__(self, tokenizer: Any, stop: Sequence[int], size: int):
        """stop: tokens at which a text ends. size: tokens that the network knows."""
        hf = _llguidance().hf
        ends = [token for token in stop if token is not None]
        size = max(size, len(tokenizer))
        self.tokens: LLTokenizer = hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=ends or None)

    def begin(self, structure: Structure) -> Follower:
        """A sequence that has no token yet. Raises RecipeError where the structure cannot be read."""
        matcher_class = _llguidance().LLMatcher
        problem = matcher_class.validate_grammar(structure.grammar, self.tokens)
        if problem:
            raise RecipeError(f"this structure cannot be read: {shortened(' '.join(problem.split()), 300)}")
        return Follower(matcher_class(self.tokens, structure.grammar, log_level=0))


class Follower:
    """Where one sequence is in its structure."""

    def __init__(self, matcher: LLMatcher):
        self.matcher = matcher

    def copy(self) -> Follower:
        """The same place, for a sequence that goes on otherwise."""
        return Follower(self.matcher.deep_copy())

    def add(self, token: int) -> None:
        """One token more. What comes after the end is not looked at."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)

    def allowed(self, size: int) -> Tensor:
        """[size] bool, of each token whether it may come next. Raises RecipeError where llguidance gives up,
        as it does on a structure that is too large.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        if self.matcher.is_error():
            problem = " ".join(self.matcher.get_error().split())
            raise RecipeError(f"the structure could not be followed: {shortened(problem, 300)}")
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=size)).bool()


def forbid(logits: Tensor, allowed: Tensor) -> None:
    """Set the logits [V] of tokens that are not allowed [V] to -inf, in place."""
    logits.masked_fill_(~allowed.to(logits.device), float("-inf"))
