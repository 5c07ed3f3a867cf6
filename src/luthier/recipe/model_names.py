"""What `model:` may be: a folder, a hub name, or a toy model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.compat.lazy_imports import import_models
from luthier.errors import RecipeError, out_of_memory, shortened
from luthier.registry import did_you_mean
from luthier.storage.toy import is_toy, toy_name, toy_package

TEXTS = (".json", ".jinja", ".txt")
MAX_TEXT = 1 << 29  # bytes of a text file of a model: the largest tokenizers have a tenth of it
# what loading a broken or foreign model may raise
LOAD_ERRORS = (
    *(OSError, ValueError, ImportError, TypeError, LookupError, AttributeError, RuntimeError),
    *(ArithmeticError, AssertionError),
)


def resolve_model(name: str) -> str:
    """toy:NAME -> its folder; a folder or hub name stays as it is. Raises RecipeError where nothing is
    there.
    """
    if is_toy(name):
        toy, model = toy_package(), toy_name(name)
        if model not in toy.models():
            raise RecipeError(f"model: no toy model is named '{model}'{did_you_mean(model, toy.models())}")
        return str(toy.path(model))
    try:
        return _resolve_path(name)
    except OSError as error:  # a folder that may not be read, a name that is too long
        reason = error.strerror or type(error).__name__
        raise RecipeError(f"model: {shortened(name)} cannot be read ({reason})") from None


def _resolve_path(name: str) -> str:
    """As `resolve_model`, of what is no toy."""
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            check_files(path)
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


def check_files(folder: Path) -> None:
    """Refuse what would be waited for, or read without end, in place of a model's files."""
    for path in folder.iterdir():
        if path.is_dir() or not path.exists():
            continue
        if not path.is_file():
            raise RecipeError(f"model: {path} is not a file")
        if path.suffix in TEXTS and path.stat().st_size > MAX_TEXT:
            raise RecipeError(f"model: {path} is larger than {MAX_TEXT >> 20} MB")


def model_config(name: str) -> Any:
    """The transformers config of a model, without its weights. Raises RecipeError where it cannot be read."""
    import_models()
    from transformers import AutoConfig

    path = resolve_model(name)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise load_error(name, error) from None


def load_error(name: str, error: Exception) -> Exception:
    """What a model could not be loaded for, in a sentence; memory that ran out stays what it is."""
    if out_of_memory(error):
        return error
    reason = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        reason = f"{type(error).__name__}: {reason}"
    return RecipeError(f"model: {name} cannot be loaded: {reason}")
