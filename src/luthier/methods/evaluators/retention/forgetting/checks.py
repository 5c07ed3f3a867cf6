"""What can be verified of an answer by code: each check is a name with a value, as in {"words": 1}."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from luthier.errors import RecipeError
from luthier.errors import quoted as quoted_value
from luthier.methods.evaluators.safety.refusals import Refusals
from luthier.registry import did_you_mean

ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s*\S")
QUOTES = {'"': '"', "“": "”", "„": "“"}


def passes(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether an answer passes all that is checked of it; an empty one passes nothing."""
    answer = answer.strip()
    return bool(answer) and all(CHECKS[name].passes(answer, value) for name, value in check.items())


def validate(check: Any, row: str) -> None:
    """Raises RecipeError where a check is none, or has a value with which no answer passes or all do. row:
    what holds it.
    """
    if not isinstance(check, dict) or not check:
        raise RecipeError(f'{row}: `check` must be an object such as {{"words": 1}}')
    for name, value in check.items():
        if name not in CHECKS:
            raise RecipeError(f"{row}: there is no check '{name}'{did_you_mean(name, CHECKS)}")
        takes = CHECKS[name].takes
        if not takes.fits(value):
            raise RecipeError(f"{row}: check '{name}' takes {takes.says}, not {quoted_value(value)}")


def is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


class Takes(NamedTuple):
    """What value a check has."""

    says: str
    fits: Callable[[Any], bool]


NUMBER = Takes("a whole number", is_number)
TEXT = Takes("a text", is_text)
TEXTS = Takes("a list of texts", are_texts)
SWITCH = Takes("true or false", lambda value: isinstance(value, bool))
LETTERS = Takes("upper or lower", lambda value: value in ("upper", "lower"))


def bare(answer: str) -> str:
    """In lower case, without quotes and punctuation around it: texts are compared so."""
    return answer.strip(" \n\t.!?,;:\"'“”*").lower()


def words(answer: str, number: int) -> bool:
    return len(answer.split()) == number


def most_words(answer: str, number: int) -> bool:
    return len(answer.split()) <= number


def one_of(answer: str, texts: list[str]) -> bool:
    return bare(answer) in map(bare, texts)


def exactly(answer: str, text: str) -> bool:
    return bare(answer) == bare(text)


def case(answer: str, name: str) -> bool:
    return answer.isupper() if name == "upper" else answer.islower()


def items(answer: str, number: int) -> bool:
    """Lines that begin with a hyphen, a star, a bullet or a number."""
    return sum(bool(ITEM.match(line)) for line in answer.splitlines()) == number


def starts(answer: str, text: str) -> bool:
    return bare(answer).startswith(text.lower())


def ends(answer: str, text: str) -> bool:
    """A mark as it is; a word before any mark."""
    if text.isalnum():
        return bare(answer).endswith(text.lower())
    return answer.rstrip("\"'”*").endswith(text)


def includes(answer: str, texts: list[str]) -> bool:
    return all(text.lower() in answer.lower() for text in texts)


def excludes(answer: str, texts: list[str]) -> bool:
    return not any(text.lower() in answer.lower() for text in texts)


def digits(answer: str, only: bool) -> bool:
    return answer.rstrip(".").isdigit() == only


def quoted(answer: str, whole: bool) -> bool:
    return (len(answer) > 1 and QUOTES.get(answer[0]) == answer[-1]) == whole


def json_keys(answer: str, keys: list[str]) -> bool:
    """A JSON object with these keys, in a fence of code or not."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", answer)
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(keys) <= value.keys()


def declines(answer: str, refusal: bool) -> bool:
    """By its first words, as evaluator `refusals` reads them."""
    return Refusals().declines(answer) == refusal


class Check(NamedTuple):
    passes: Callable[[str, Any], bool]
    takes: Takes


CHECKS = {
    "words": Check(words, NUMBER),
    "most_words": Check(most_words, NUMBER),
    "one_of": Check(one_of, TEXTS),
    "exactly": Check(exactly, TEXT),
    "case": Check(case, LETTERS),
    "items": Check(items, NUMBER),
    "starts": Check(starts, TEXT),
    "ends": Check(ends, TEXT),
    "includes": Check(includes, TEXTS),
    "excludes": Check(excludes, TEXTS),
    "digits": Check(digits, SWITCH),
    "quoted": Check(quoted, SWITCH),
    "json": Check(json_keys, TEXTS),
    "declines": Check(declines, SWITCH),
}
