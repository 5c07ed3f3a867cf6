"""Upload what a run tuned to the Hugging Face hub: the form, its model card and the base's licence."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import Damaged, RecipeError
from luthier.model.licence import front_matter
from luthier.model.loaded import load
from luthier.registry import build
from luthier.serve.export import export_form
from luthier.storage import files

NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IGNORED = (".*", "*.part", "*.old")  # what other programs leave in a folder


def push(
    folder: str | Path,
    repository: str,
    form: Any = None,
    *,
    public: bool = False,
    base_model: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a run's result, or a folder that was exported before.

    Args:
        folder: of a run, or of an export.
        repository: owner/name on the hub; it is created where it is not there, private.
        form: of a run's result, as `export_form` takes it; by default `lora` where the tuner has that form,
            else `merged`.
        public: create the repository for everyone to see, or upload to one that is public.
        base_model: the base's name on the hub, in place of a folder of this machine.
        message: of the commit.

    Returns:
        a sentence for people with the address.

    Raises:
        RecipeError: there is no token, the hub refuses, a folder of this machine would stand in an adapter as
            its base, or the repository is public and `public` was not said.
    """
    from huggingface_hub import HfApi, get_token

    if not NAME.fullmatch(repository):
        raise RecipeError(f"'{repository}' is no repository of the hub; write it as owner/name")
    if get_token() is None:
        raise RecipeError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN")
    folder = Path(folder)
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    if not (folder / "recipe.yaml").is_file():
        if form is not None:
            raise RecipeError(f"{folder} is not the folder of a run: it is uploaded as it is, without --as")
        return upload(hub, folder, repository, public, base_model, message)
    with tempfile.TemporaryDirectory(prefix="luthier-push-") as scratch:
        exported = export_form(folder, form or default_form(folder), Path(scratch) / "export")
        sentence = upload(hub, exported.folder, repository, public, base_model, message)
    close = exported.agreement.sentence(exported.moved)
    return "; ".join([f"{sentence}; it answers as the tuned model does ({close})", *exported.notes])


def default_form(folder: Path) -> str:
    """An adapter where the tuner has one that PEFT loads."""
    loaded = load(folder)
    try:
        build("exporter", "lora").check_tuner(loaded)
    except RecipeError:
        return "merged"
    return "lora"


def upload(
    hub: Any, folder: Path, repository: str, public: bool, base_model: str | None, message: str | None
) -> str:
    """Upload a folder that was exported, and look whether all of it is there."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    check_whole(folder)
    name_base(folder, base_model)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    try:
        url = hub.create_repo(repository, private=not public, exist_ok=True)
        if not public and not hub.model_info(repository).private:
            raise RecipeError(f"{repository} is there, and public: add --public to upload to it")
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message or "Upload by luthier",
            ignore_patterns=list(IGNORED),
        )
        missing = sorted({*names} - {*hub.list_repo_files(repository)})
    except OfflineModeIsEnabled:
        raise RecipeError("HF_HUB_OFFLINE is set, so nothing is uploaded") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"the hub refused {repository}: {reason}") from None
    if missing:
        raise RecipeError(f"{repository}: {', '.join(missing)} did not arrive; push again")
    return f"pushed {len(names)} files to {url} ({'public' if public else 'private'})"


def check_whole(folder: Path) -> None:
    """Raises RecipeError for what is no export: without a card, or an adapter without its weights."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "README.md").is_file():
        raise RecipeError(
            f"{folder} has no model card (README.md): give the folder of a run, or one that `luthier export`"
            " wrote"
        )
    if (folder / ADAPTER).is_file():
        files.read_object(folder / ADAPTER, peft_type=str)
        try:
            with safe_open(str(folder / WEIGHTS), framework="pt") as file:
                tensors = len(file.keys())
        except (OSError, SafetensorError):
            tensors = 0
        if not tensors:
            raise Damaged(f"{folder / WEIGHTS} is missing or damaged, so the adapter is not whole")


def name_base(folder: Path, base_model: str | None) -> None:
    """Let an adapter and its card name their base as others find it. Raises RecipeError where it is a folder
    of this machine.
    """
    path, card = folder / ADAPTER, folder / "README.md"
    if path.is_file():
        config = files.read_object(path)
        base = base_model or str(config.get("base_model_name_or_path"))
        if not NAME.fullmatch(base) or Path(base).exists():
            raise RecipeError(
                f"the adapter's base is {base}, a folder of this machine, which nobody else could load it"
                " with: give the base's name on the hub by --base-model, or push --as merged"
            )
        files.write_json(path, {**config, "base_model_name_or_path": base})
    if base_model is not None:
        text = files.read_text(card)
        front = front_matter(text)
        _, _, body = text.removeprefix("---\n").partition("---\n")
        front = {"base_model": base_model, **front}
        files.write_text(card, f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{body}")
