"""Data-set lists of other tools: entries of axolotl's `datasets:` and of LLaMA-Factory's dataset_info.json,
as settings of a Source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def from_axolotl(entry: dict) -> dict[str, Any]:
    """An entry of axolotl's `datasets:` under our keys; keys of ours pass through."""
    spec = dict(entry)
    columns = dict(spec.pop("columns", None) or {})
    tags = dict(spec.pop("tags", None) or {})
    prompt_type = spec.pop("type", None)
    if isinstance(prompt_type, dict):  # a prompt of the user's own: field_instruction, field_output, ...
        for key, column in prompt_type.items():
            if key.startswith("field_"):
                columns.setdefault(key.removeprefix("field_"), column)
    elif prompt_type is not None:
        spec["format"] = spec.get("format") or axolotl_format(str(prompt_type))
    if spec.pop("ds_type", None) or spec.get("path") in AXOLOTL_LOADERS:
        spec["path"] = spec.pop("data_files", None) or spec.get("path")
    for key, column in AXOLOTL_FIELDS.items():
        if key in spec:
            columns[column] = spec.pop(key)
    for ours, theirs in (spec.pop("message_property_mappings", None) or {}).items():
        tags[theirs] = ours
    for role, aliases in (spec.pop("roles", None) or {}).items():
        for alias in [aliases] if isinstance(aliases, str) else aliases:
            tags[alias] = role
    if columns:
        spec["columns"] = columns
    if tags:
        spec["tags"] = tags
    return spec


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
    except ValueError as why:
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
    if "file_name" in entry:
        place = str(path.parent / entry["file_name"])
    else:
        place = entry.get("hf_hub_url")
    if not place:
        raise RecipeError(f"{path}: the entry '{name}' has neither file_name nor hf_hub_url")
    columns = {}
    for key, theirs in (entry.get("columns") or {}).items():
        ours = LLAMA_FACTORY_COLUMNS.get(key, key)
        if theirs and ours != theirs:
            columns[ours] = theirs
    tags = {}
    for key, theirs in (entry.get("tags") or {}).items():
        if key in LLAMA_FACTORY_TAGS:
            tags[theirs] = LLAMA_FACTORY_TAGS[key]
    return {
        "path": place,
        "split": entry.get("split"),
        "name": entry.get("subset"),
        "columns": columns,
        "tags": tags,
        "limit": entry.get("num_samples"),
    }
