"""config.json and generation_config.json of what tuning made: those of the base, but for what tuning meant to
change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.model.base_mark import folder_of
from luthier.storage import files

CONFIG, GENERATION = "config.json", "generation_config.json"
# settings that a run changes in memory, or that say how a file was loaded
RUNTIME = {CONFIG: ("use_cache",), "tokenizer_config.json": ("local_files_only", "is_local")}
# where transformers before 5 looks for what is in `rope_parameters` now: without them, tools that stand on
# it would take their own default for the base's frequencies, and say nothing
EARLIER = ("rope_theta", "rope_scaling")


def plain_configs(model: str, folder: Path, stop: Sequence[int]) -> None:
    """Set right what lies in a folder. model: the base's name. stop: tokens at which an answer ends; where
    the base's generation config stops at others, it stops at these too.
    """
    base = folder_of(model)
    if base is not None:
        for name, keys in RUNTIME.items():
            _restore(folder / name, base / name, keys)
    path = folder / GENERATION
    if not stop:
        return
    generation = _read(path) or (_read(base / GENERATION) if base else {})
    ends = generation.get("eos_token_id")
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    if missing := [token for token in stop if token not in ends]:
        files.write_json(path, {**generation, "eos_token_id": [*ends, *missing]})


def _restore(path: Path, base: Path, keys: Sequence[str]) -> None:
    """Give these keys of a config the base's values, or none where it has none; and let earlier versions of
    transformers read what they could read of the base.
    """
    config, former = _read(path), _read(base)
    restored = {}
    for key, value in config.items():
        if key not in keys:
            restored[key] = value
        elif key in former:
            restored[key] = former[key]
    for key in EARLIER:
        if key in former and "rope_parameters" in config:
            restored.setdefault(key, former[key])
    if restored != config:
        files.write_json(path, restored)


def _read(path: Path) -> dict[str, Any]:
    return files.read_object(path) if path.is_file() else {}
