"""Data-set lists of other tools: entries of axolotl's `datasets:` and of LLaMA-Factory's dataset_info.json,
as settings of a Source.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from luthier.errors import RecipeError
from luthier.registry import did_you_mean, names

AXOLOTL_TYPES = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt", "chat_template": None}
AXOLOTL_FIELDS = {
    "field": "text",
    "field_messages": "messages",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_tools": "tools",
    "field_system": "system",
}
AXOLOTL_LOADERS = ("json", "csv", "parquet", "text")  # a path that names a loader of `datasets`
LLAMA_FACTORY_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
}
LLAMA_FACTORY_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(instruction|input|system)\}")


class PromptLayout(BaseModel):
    """How axolotl writes a prompt of a row's instruction and input, where its `type:` is a mapping."""

    model_config = ConfigDict(extra="forbid")

    format: str = "{instruction} {input} "
    no_input_format: str | None = None  # of rows without an input; default: `format`
    system_prompt: str = ""  # of rows without a system prompt of their own
    system_format: str = "{system}"

    def apply(self, row: dict) -> dict:
        """A row of instruction, input, system and output as prompt and completion; others as they are."""
        if not isinstance(row.get("instruction"), str) or "output" not in row:
            return row
        cells = {name: str(row.get(name) or "") for name in ("instruction", "input", "system")}
        cells["system"] = cells["system"] or self.system_prompt
        layout = self.format
        if not cells["input"] and self.no_input_format is not None:
            layout = self.no_input_format
        prompt = filled(layout, cells)
        if cells["system"]:
            prompt = filled(self.system_format, cells) + prompt
        rest = {name: value for name, value in row.items() if name not in (*cells, "output")}
        return {**rest, "prompt": prompt, "completion": row["output"]}


def filled(layout: str, cells: dict[str, str]) -> str:
    """A layout with {instruction}, {input} and {system} replaced; {{ and }} are braces."""

    def cell(match: re.Match[str]) -> str:
        name = match[1]
        return match[0][0] if name is None else cells[name]

    return PLACEHOLDER.sub(cell, layout)


def from_axolotl(entry: dict) -> dict[str, Any]:
    """An entry of axolotl's `datasets:` under our keys; keys of ours pass through."""
    spec = dict(entry)
    columns, tags = mapping(spec, "columns"), mapping(spec, "tags")
    prompt_type = spec.pop("type", None)
    if isinstance(prompt_type, dict):  # a prompt of the user's own: field_instruction, field_output, ...
        layout = {}
        for key, value in prompt_type.items():
            name = str(key).removeprefix("field_")
            if name == key:
                layout[key] = value
            elif value and value != name:
                columns.setdefault(name, value)
        if layout:
            spec["prompt_layout"] = layout
    elif prompt_type is not None:
        spec["format"] = spec.get("format") or axolotl_format(str(prompt_type))
    if spec.pop("ds_type", None) or spec.get("path") in AXOLOTL_LOADERS:
        spec["path"] = spec.pop("data_files", None) or spec.get("path")
    for key, column in AXOLOTL_FIELDS.items():
        if key in spec:
            columns[column] = spec.pop(key)
    for ours, theirs in mapping(spec, "message_property_mappings").items():
        tags[str(theirs)] = ours
    for role, aliases in mapping(spec, "roles").items():
        for alias in aliases if isinstance(aliases, list) else [aliases]:
            tags[str(alias)] = role
    if columns:
        spec["columns"] = columns
    if tags:
        spec["tags"] = tags
    return spec


def mapping(spec: dict, key: str) -> dict[str, Any]:
    """A mapping that an entry has under a key, taken out of it. Raises RecipeError for anything else."""
    value = spec.pop(key, None) or {}
    if not isinstance(value, dict):
        raise RecipeError(f"data: {key} must be a mapping of names, not {type(value).__name__}")
    return dict(value)


def axolotl_format(prompt_type: str) -> str | None:
    """Our format of one of axolotl's types such as `alpaca` or `chat_template.default`; None where the
    columns tell.
    """
    name = prompt_type.partition(".")[0].partition(":")[0]
    if name in AXOLOTL_TYPES:
        return AXOLOTL_TYPES[name]
    return name if name in names("format") else None


def from_dataset_info(path: Path, name: str | None) -> dict[str, Any]:
    """An entry of LLaMA-Factory's dataset_info.json under our keys. name may be left out where there is one
    entry. Raises RecipeError where the file is no such list, or has no such entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as why:
        raise RecipeError(f"{path} is not valid JSON: {why}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise RecipeError(f"{path} is not a list of data sets (a JSON object such as dataset_info.json)")
    if not name and len(entries) == 1:
        name = next(iter(entries))
    if not name:
        raise RecipeError(
            f"{path} lists several data sets: {', '.join(entries)}; select one with {path.name}:NAME"
        )
    if name not in entries:
        raise RecipeError(
            f"{path} has no data set named '{name}' (select one with {path.name}:NAME)"
            f"{did_you_mean(name, entries)}"
        )
    entry = entries[name]
    place = entry.get("hf_hub_url")
    if "file_name" in entry:
        place = str(path.parent / str(entry["file_name"]))
    if not place:
        raise RecipeError(f"{path}: the entry '{name}' has neither file_name nor hf_hub_url")
    columns = {}
    for key, theirs in mapping(dict(entry), "columns").items():
        ours = LLAMA_FACTORY_COLUMNS.get(key, key)
        if theirs and ours != theirs:
            columns[ours] = theirs
    tags = {}
    for key, theirs in mapping(dict(entry), "tags").items():
        if key in LLAMA_FACTORY_TAGS:
            tags[str(theirs)] = LLAMA_FACTORY_TAGS[key]
    return {
        "path": place,
        "split": entry.get("split"),
        "name": entry.get("subset"),
        "columns": columns,
        "tags": tags,
        "limit": entry.get("num_samples"),
    }
