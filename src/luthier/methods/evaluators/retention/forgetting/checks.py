"""What can be verified of an answer by code: each check is a name with a value, as in {"words": 1}."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.evaluators.safety.refusals import Refusals
from luthier.registry import did_you_mean

ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s*\S")
QUOTES = {'"': '"', "“": "”", "„": "“"}


def passes(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether an answer passes all that is checked of it; an empty one passes nothing."""
    answer = answer.strip()
    return bool(answer) and all(CHECKS[name](answer, value) for name, value in check.items())


def validate(check: Any, row: str) -> None:
    """Raises RecipeError where a check is none. row: what holds it."""
    if not isinstance(check, dict) or not check:
        raise RecipeError(f'{row}: `check` must be an object such as {{"words": 1}}')
    for name in check:
        if name not in CHECKS:
            raise RecipeError(f"{row}: there is no check '{name}'{did_you_mean(name, CHECKS)}")


def bare(answer: str) -> str:
    """In lower case, without quotes and punctuation around it."""
    return answer.strip(" \n\t.!?,;:\"'“”*").lower()


def words(answer: str, number: int) -> bool:
    return len(answer.split()) == number


def most_words(answer: str, number: int) -> bool:
    return len(answer.split()) <= number


def one_of(answer: str, texts: list[str]) -> bool:
    return bare(answer) in texts


def exactly(answer: str, text: str) -> bool:
    return bare(answer) == text


def case(answer: str, name: str) -> bool:
    return answer.isupper() if name == "upper" else answer.islower()


def items(answer: str, number: int) -> bool:
    """Lines that begin with a hyphen, a star, a bullet or a number."""
    return sum(bool(ITEM.match(line)) for line in answer.splitlines()) == number


def starts(answer: str, text: str) -> bool:
    return bare(answer).startswith(text)


def ends(answer: str, text: str) -> bool:
    """A mark as it is; a word before any mark."""
    if text.isalnum():
        return bare(answer).endswith(text)
    return answer.rstrip("\"'”*").endswith(text)


def includes(answer: str, texts: list[str]) -> bool:
    return all(text in answer.lower() for text in texts)


def excludes(answer: str, texts: list[str]) -> bool:
    return not any(text in answer.lower() for text in texts)


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


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "words": words,
    "most_words": most_words,
    "one_of": one_of,
    "exactly": exactly,
    "case": case,
    "items": items,
    "starts": starts,
    "ends": ends,
    "includes": includes,
    "excludes": excludes,
    "digits": digits,
    "quoted": quoted,
    "json": json_keys,
    "declines": declines,
}
