"""The Python in a text that a model wrote."""

from __future__ import annotations

import re

FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
PYTHON = ("", "py", "python", "python3")
DEFINES = re.compile(r"^\s*(?:async def|def|class) ", re.MULTILINE)


def extract_code(text: str) -> str:
    """The code in a text: the last fenced block of Python that defines something, else the last, else all of
    it.
    """
    blocks = [code for language, code in FENCE.findall(text) if language.lower() in PYTHON]
    defining = [block for block in blocks if DEFINES.search(block)]
    return (defining or blocks or [text])[-1]
