"""What several commands read and print: a recipe with changes, a form with settings, tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import RecipeError
from luthier.recipe.published import is_published
from luthier.storage.toy import is_toy

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe (or the folder of a run, toy:TASK, or recipe:NAME), and KEY=VALUE changes.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def method_names(kind: str) -> Callable[[str], list[str]]:
    """What a shell offers where a method of this kind is to be named."""

    def complete(incomplete: str) -> list[str]:
        from luthier.registry import names

        return [name for name in names(kind) if name.startswith(incomplete)]

    return complete


def recipe_words(words: list[str] | None, **options: str | None) -> tuple[Path | str | None, list[str]]:
    """A recipe's path or toy:TASK, if one was named, and every change: key=value words, then options."""
    files = [w for w in words or () if "=" not in w or Path(w).is_file()]
    if len(files) > 1:
        raise RecipeError(
            f"only one recipe at a time, not {' and '.join(files)} (write changes as KEY=VALUE)"
        )
    # taken as they are; the others may be YAML such as "{name: lora, r: 16}"
    plain = ("model", "data", "output_dir")
    changes = []
    for key, value in options.items():
        if value is not None and key in plain:
            value = json.dumps(value)
        if value is not None:
            changes.append(f"{key}={value}")
    changes += [w for w in words or () if w not in files]
    if not files:
        return None, changes
    if is_toy(files[0]) or is_published(files[0]):
        return files[0], changes
    path = Path(files[0])
    if path.is_dir():
        path = path / "recipe.yaml"
    return path, changes


def form_words(words: list[str], form: str | None) -> tuple[str, Any]:
    """A run's folder, and a form of export with the settings that were named as KEY=VALUE; None for no
    form.
    """
    from luthier.storage.bounded_yaml import load_yaml

    folder, *changes = words
    settings: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"'{change}' is no setting; write settings as KEY=VALUE")
        settings[key] = load_yaml(value, key)
    if not settings:
        return folder, form
    if form is None:
        raise RecipeError(f"{', '.join(settings)}: settings belong to a form; name it with --as")
    return folder, {"name": form, **settings}


@contextmanager
def started_together() -> Iterator[bool]:
    """Within a command that several processes may run: is this the one that talks? What one of them is
    refused for, also before its run begins, all are.
    """
    from luthier.processes import launcher

    if not launcher.several():
        yield True
        return
    from luthier.processes import group

    with group.together() as processes:
        yield processes.main


def progress(quiet: bool):
    """The callback of a command: one that prints progress, or one that prints nothing."""
    from luthier.report.console import Callback, Console

    return Callback() if quiet else Console()


def dumped(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def show(rows: list[dict], as_json: bool, columns: tuple[str, ...]) -> None:
    """A list of objects, as JSON or as a table."""
    if as_json:
        typer.echo(dumped(rows))
        return
    from luthier.report.console import Console

    Console().listing(rows, columns)
