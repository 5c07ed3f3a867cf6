"""search.json, the result of a search, as it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.storage import files

RESULT = "search.json"
# keys as version 0.1 wrote them -> as they are called now
FORMER_KEYS = {
    "found": "chosen",
    "over": "space",
    "said": "description",
    "spent": "full_runs",
    "start": "baseline",
    "took": "seconds",
}
FORMER_TRIAL_KEYS = {**FORMER_KEYS, "over": "violation"}


def read_result(path: Path) -> dict[str, Any]:
    """A search's result as plain data."""
    result = rename(files.read_json(path), FORMER_KEYS)
    result["chosen"] = [rename(line, FORMER_KEYS) for line in result["chosen"]]
    result["trials"] = [rename(trial, FORMER_TRIAL_KEYS) for trial in result["trials"]]
    if result.get("baseline"):
        result["baseline"] = rename(result["baseline"], FORMER_KEYS)
    return result


def rename(values: dict[str, Any], former: dict[str, str]) -> dict[str, Any]:
    """The same mapping with today's keys."""
    return {former.get(key, key): value for key, value in values.items()}
