"""What `model:` may be: a folder, a hub name, or a toy model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.compat.lazy_imports import import_models
from luthier.errors import RecipeError
from luthier.registry import did_you_mean
from luthier.storage.toy import is_toy, toy_name, toy_package


def resolve_model(name: str) -> str:
    """toy:NAME -> its folder; a folder or hub name stays as it is. Raises RecipeError where nothing is
    there.
    """
    if is_toy(name):
        toy, model = toy_package(), toy_name(name)
        if model not in toy.models():
            raise RecipeError(f"model: no toy model is named '{model}'{did_you_mean(model, toy.models())}")
        return str(toy.path(model))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        hint = ""
        if (path / "adapter_config.json").is_file():
            hint = "; it holds an adapter: set `model:` to its base model and `init_from:` to this folder"
        raise RecipeError(f"model: {name} has no config.json, so it is not a transformers model{hint}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        near = []
        if path.parent.is_dir():
            near = [p.name for p in path.parent.iterdir() if p.is_dir()]
        raise RecipeError(f"model: folder {name} does not exist{did_you_mean(path.name, near)}")
    return name


def model_config(name: str) -> Any:
    """The transformers config of a model, without its weights. Raises RecipeError where it cannot be read."""
    import_models()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(f"model: {name} cannot be loaded: {reason}") from None
