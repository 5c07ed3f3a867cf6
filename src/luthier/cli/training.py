"""Train a model, and look at what a recipe says before."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.options import (
    AsJson,
    Words,
    dumped,
    method_names,
    progress,
    recipe_words,
    show,
    started_together,
)


def tune(
    words: Words = None,
    model: Annotated[str | None, typer.Option(help="Model: a folder, Hub name or toy:NAME.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training data: a file, folder, Hub name or toy:TASK.")
    ] = None,
    tuner: Annotated[
        str | None,
        typer.Option(
            help="Tuner, e.g. lora or full; `luthier methods --kind tuner` lists all.",
            autocompletion=method_names("tuner"),
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Objective (loss), e.g. sft, or 'dpo + 0.1*sft'.", autocompletion=method_names("objective")
        ),
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    front: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of models to train, each with other weights of the goals; see plan front."
        ),
    ] = None,
    stop_at: Annotated[
        float | None,
        typer.Option(help="Pause at this step (below 1: at this fraction of the run) to resume later."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the folder of the run.")] = False,
) -> None:
    """Fine-tune a model. A run that was stopped resumes when the same command is run again."""
    from luthier.recipe.recipe import Recipe

    source, changes = recipe_words(
        words, model=model, data=data, tuner=tuner, objective=objective, output_dir=output_dir
    )
    if front:
        changes += ["plan.name=front", f"plan.points={front}"]
    with started_together() as main:
        recipe = Recipe.load(source, changes)
        from luthier.run.run import perform

        callback = progress(quiet or not main)
        report = perform(recipe, callback=callback, stop_at=stop_at)
    if "paused_at" not in report.stats:
        callback.finish(report)
    if quiet and main:
        typer.echo(report.folder)


def explain(words: Words = None, as_json: AsJson = False) -> None:
    """Print every resolved value of a recipe, and where it comes from."""
    from dataclasses import asdict

    from luthier.recipe import catalogue

    source, changes = recipe_words(words)
    values, messages = catalogue.explain(source, changes)
    for message in messages:
        typer.echo(message, err=True)
    if as_json:
        typer.echo(dumped([asdict(value) for value in values]))
    else:
        show([value.as_text() for value in values], False, ("key", "value", "origin"))
