"""Other tools' configurations, the shell's completion, and the pages that follow from the declarations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from luthier.errors import RecipeError

COMPLETE = "_LUTHIER_COMPLETE"  # in the environment when a shell asks for completions


def import_configuration(
    file: Annotated[
        Path,
        typer.Argument(help="A configuration of LLaMA-Factory, axolotl, ms-swift or TRL: YAML, JSON or .sh."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Recipe to write (default: print it to standard output).")
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option(help="llama_factory, axolotl, ms_swift or trl, where the file does not tell."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Devices it was written for; the effective batch size counts all of them."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse keys that are not known.")] = False,
) -> None:
    """Turn another tool's configuration into a recipe, and say what became of every key."""
    from luthier.tools.foreign.convert import import_file, sentence

    imported = import_file(file, tool, devices)
    for note in imported.notes:
        typer.echo(sentence(note), err=True)
    unknown = imported.of("unknown")
    if unknown and strict:
        raise RecipeError(f"{file}: unknown keys: {', '.join(note.key for note in unknown)}")
    if output is None:
        typer.echo(imported.yaml(), nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(imported.yaml(), encoding="utf-8")
    typer.echo(f"Recipe: {output}")


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell: bash, zsh or fish.")],
) -> None:
    """Print the completion of this command line: `eval "$(luthier completion bash)"`."""
    from typer.completion import completion_init, get_completion_script

    completion_init()
    script = {"prog_name": "luthier", "complete_var": COMPLETE, "shell": shell}
    typer.echo(get_completion_script(**script))


def docs(
    check: Annotated[
        bool, typer.Option("--check", help="Fail if the pages differ from the declarations.")
    ] = False,
    output_dir: Annotated[Path, typer.Option(help="The docs folder.")] = Path("docs"),
) -> None:
    """Write the pages that follow from the declarations."""
    from luthier.tools.docs import docs

    raise typer.Exit(docs(output_dir, check))
