"""The table of docs/templates.md: families of chat templates by kinds of conversation, each cell tried.

`python -m helpers.template_table` (with src and tests on the path) writes it; further templates, of models
whose files are at hand, from the folders in --also.
"""

from __future__ import annotations

import argparse
import copy
import re
import warnings
from pathlib import Path

import yaml

from helpers.chat_templates import FAMILIES, family_tokenizer, tokenizer_for
from helpers.paths import ROOT
from luthier.data.load import load_rows
from luthier.text.encode import Renderer

PAGE = ROOT / "docs" / "templates.md"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "a city"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "type": "function",
    "id": "abc123def",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
}
SYSTEM = {"role": "system", "content": "Answer in two words."}
USER = {"role": "user", "content": "Capital of Norway?"}
REPLY = {"role": "assistant", "content": "Oslo City"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "name": "get_weather", "content": "17 degrees"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Capital of Norway?"}]}
KINDS = {
    "single": {"messages": [USER, REPLY]},
    "multi-turn": {
        "messages": [USER, REPLY, {"role": "user", "content": "Of Peru?"}, {**REPLY, "content": "Lima City"}]
    },
    "system": {"messages": [SYSTEM, USER, REPLY]},
    "tools": {"messages": [USER, CALLS, RESULT, REPLY], "tools": [TOOL]},
    "call beside text": {"messages": [USER, {**CALLS, "content": "I look it up."}], "tools": [TOOL]},
    "reasoning": {"messages": [USER, {**REPLY, "reasoning_content": "Norway lies north."}]},
    "parts": {"messages": [PARTS, REPLY]},
    "begun reply": {
        "prompt": [USER, {**REPLY, "content": "Oslo "}],
        "completion": [{**REPLY, "content": "City"}],
    },
}
LEARNED = "✓"


def cell(tokenizer, row: dict) -> str:
    """✓, or the advice that was followed with success; the reason where no advice is given."""
    outcome, reason = attempt(tokenizer, row)
    if outcome:
        return LEARNED
    setting = re.search(r"set (chat_template(?:_kwargs)?: (?:\{.*?\}|\w+))", reason)
    if setting is None:
        return f"refused: {reason}"
    followed, why = attempt(tokenizer, row, **yaml.safe_load(setting[1]))
    if not followed:
        raise AssertionError(f"the advice does not work: {setting[1]}: {why}")
    return f"`{setting[1]}`"


def attempt(tokenizer, row: dict, **settings) -> tuple[bool, str]:
    """(whether all of a row is learned, why not)."""
    loaded = load_rows([copy.deepcopy(row)], max_bad_rows=1.0)
    renderer = Renderer(copy.deepcopy(tokenizer), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, bad, _ = renderer.encode_all(loaded.rows)
    if bad or loaded.bad:
        return False, [*loaded.bad, *bad][0]["reason"]
    whole = "".join(renderer.decode_marked(each) for each in rows)
    learned = "".join(re.findall("⟦(.*?)⟧", whole, re.DOTALL))
    for word in words_of(row):
        assert word in learned, f"{word!r} is not learned: {learned!r}"
    for word in ("Norway?", *(["Answer in two words."] if SYSTEM in row.get("messages", ()) else [])):
        assert word in whole, f"{word!r} is not in {whole!r}"
    return True, ""


def words_of(row: dict) -> list[str]:
    """What must stand in what is learned of a row."""
    if "completion" in row:
        return ["City"]
    words = []
    for turn in row["messages"]:
        if turn["role"] == "assistant":
            words += [turn["content"], turn.get("reasoning_content", "")]
            if turn.get("tool_calls"):
                words += ["get_weather", "Oslo"]
    return words


def table(tokenizers: dict) -> list[str]:
    """The table's lines."""
    lines = [f"| family | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for family, tokenizer in tokenizers.items():
        cells = [cell(tokenizer, row) for row in KINDS.values()]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def written(page: str) -> str:
    """The table as a page has it."""
    start = page.index("| family |")
    return page[start : page.index("\n\n", start)]


def shipped() -> dict:
    """The families whose templates TRL ships."""
    return {family: family_tokenizer(family) for family in FAMILIES}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--also", type=Path, help="a folder with FAMILY.jinja files")
    tokenizers = shipped()
    folder = parser.parse_args().also
    for path in sorted(folder.glob("*.jinja")) if folder else ():
        template = path.read_text(encoding="utf-8")
        eos = "<|im_end|>" if "<|im_end|>" in template else "</s>"
        tokenizers[f"{path.stem} *"] = tokenizer_for(template, "<s>", eos)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(written(page), "\n".join(table(tokenizers))), encoding="utf-8")


if __name__ == "__main__":
    main()
