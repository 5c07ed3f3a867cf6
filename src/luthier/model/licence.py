"""The licence of a base model, from its own model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from luthier.errors import Damaged
from luthier.model.base_mark import folder_of
from luthier.recipe.model_names import resolve_model
from luthier.storage import files

KEYS = ("license", "license_name", "license_link")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md")  # files beside the weights
LARGEST = 1 << 22  # bytes of a card that is read


def front_matter(text: str) -> dict[str, Any]:
    """What stands between the first two lines of --- of a card; nothing where it has none, or is no YAML."""
    opening, _, rest = text.partition("\n")
    block, end, _ = rest.partition("\n---")
    if opening.strip() != "---" or not end:
        return {}
    try:
        values = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def licence_of(model: str) -> dict[str, str]:
    """{license, and where it is one of the hub's "other": license_name, license_link}; {license: unknown}
    where the model's folder has no card that names one. model: a base as a recipe names it.
    """
    folder = _folder(model)
    card: dict[str, Any] = {}
    if folder is not None and (folder / "README.md").is_file():
        try:
            card = front_matter(files.read_text(folder / "README.md", LARGEST))
        except Damaged:
            card = {}
    licence = {}
    for key in KEYS:
        if isinstance(card.get(key), str):
            licence[key] = card[key]
    if "license" not in licence:
        return {"license": "unknown"}
    return licence


def licence_files(model: str) -> dict[str, str]:
    """Name -> text of the licences that lie beside a base's weights."""
    folder, texts = _folder(model), {}
    for name in LICENCES:
        if folder is not None and (folder / name).is_file():
            try:
                texts[name] = files.read_text(folder / name, LARGEST)
            except Damaged:
                continue
    return texts


def fetch_card(model: str) -> None:
    """Have the card and the licence of a base from the hub in the hub's cache, where they can be had: loading
    a model fetches its weights and settings alone.
    """
    from huggingface_hub import hf_hub_download

    if _folder(model) is None or Path(resolve_model(model)).is_dir():
        return
    for name in ("README.md", *LICENCES):
        try:
            hf_hub_download(model, name)
        except (OSError, ValueError):  # offline, or there is no such file
            continue


def _folder(model: str) -> Path | None:
    try:
        return folder_of(model)
    except ValueError:  # no name of the hub, and no folder
        return None
