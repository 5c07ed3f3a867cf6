"""Programs and checks for the sandbox, as text: `=== name`, the program, and after `---` a check."""

from __future__ import annotations

import re

from helpers.paths import ROOT

PLACE = ROOT / "tests/sandbox/cases"


def programs(name: str) -> dict[str, str]:
    """Name -> program, of a file."""
    text = (PLACE / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^=== (.+)\n", text, flags=re.MULTILINE)
    return {title: body.strip("\n") for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def pairs(name: str) -> dict[str, tuple[str, str]]:
    """Name -> (program, check), of a file."""
    divided = {}
    for title, text in programs(name).items():
        program, check = re.split(r"^---\n", text, maxsplit=1, flags=re.MULTILINE)
        divided[title] = (program.strip("\n"), check)
    return divided
