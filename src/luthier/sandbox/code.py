"""The Python in a text that a model wrote."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator

from .limits import CODE, TEXT

OPENING = re.compile(r"```[ \t]*([\w+-]*)")
CLOSING = re.compile(r"\n[ \t]*```")
PYTHON = ("", "py", "python", "python3")
DEFINES = re.compile(r"^[ \t]*(?:async def|def|class) ", re.MULTILINE)
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what `parse` may raise


def extract_code(text: str) -> str:
    """The code in a text: the last fenced block of Python that defines something, else the last, else all of
    it. Of a text longer than `limits.TEXT` the end is read.
    """
    text = text[-TEXT:]
    last, defining = None, None
    for language, code in fenced(text):
        if language.lower() not in PYTHON:
            continue
        last = code
        if DEFINES.search(code):
            defining = code
    if defining is not None:
        return defining
    return text if last is None else last


def parse(code: str) -> ast.Module:
    """The syntax tree of a program, without Python's warnings about it. Raises one of UNPARSABLE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def tree_of(code: str) -> ast.Module | None:
    """The syntax tree of a program that a model wrote; None where there is none, or it is longer than
    `limits.CODE`.
    """
    if len(code) > CODE:
        return None
    try:
        return parse(code)
    except UNPARSABLE:
        return None


def fenced(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of every fenced block, the last of which may be open at its end. Each character is
    looked at once: a text of nothing but fences takes no longer than another.
    """
    end = 0
    while (opening := OPENING.search(text, end)) is not None:
        begin = text.find("\n", opening.end())
        if begin < 0:
            return
        closing = CLOSING.search(text, begin + 1)
        close, end = closing.span() if closing else (len(text), len(text))
        yield opening.group(1), text[begin + 1 : close]
