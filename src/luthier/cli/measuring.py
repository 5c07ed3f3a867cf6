"""Look at rows, and measure models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import AsJson, dumped


def data(
    source: Annotated[str, typer.Argument(help="A file, folder, Hub name or toy:TASK.")],
    model: Annotated[str, typer.Option(help="Model whose tokenizer renders the rows.")] = "toy:lm",
    chat_template: Annotated[
        str | None, typer.Option(help="Chat template that renders conversations, as in a recipe.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum row length in tokens, as in a recipe.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Number of rows to show.")] = 3,
    every: Annotated[
        bool,
        typer.Option("--all", help="List every objective: whether it can train on these rows, or why not."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at rows: how they are read, which objective suits them, how long they are, what repeats, what is
    unusable and why, and which tokens are supervised.
    """
    from luthier.report.text import MARKS
    from luthier.text.preview import preview

    result = preview(source, model, chat_template, examples, MARKS, max_length)
    if as_json:
        typer.echo(dumped(result))
        return
    from luthier.report.console import Console

    Console().survey(source, result, every)


def inspect(
    base: Annotated[
        str, typer.Argument(help="The base model: a folder, Hub name, toy:NAME or the folder of a run.")
    ],
    tuned: Annotated[str, typer.Argument(help="The tuned model, in the same forms.")],
    data: Annotated[
        str | None, typer.Option(help="Rows to evaluate on (default: the run's held-out rows).")
    ] = None,
    preference: Annotated[
        bool,
        typer.Option(
            "--preference", help="Use preference pairs: ranking accuracy, margins, drift from the base model."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write, with weights, answers, calibration and diversity in addition."
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 where this holds, such as 'retention < -2' (points); may be repeated."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two models: loss, accuracy, and retention of other tasks."""
    from luthier.report.console import Console
    from luthier.serve.inspect import inspect

    result = inspect(base, tuned, data, preference=preference, report=report, fail_if=fail_if or ())
    if as_json:
        typer.echo(dumped(result))
    else:
        Console().inspection(result)
        if report is not None:
            typer.echo(f"Report: {report}")
    for condition in result["failed"]:
        typer.echo(f"luthier: {condition}", err=True)
    if result["failed"]:
        raise typer.Exit(1)


def evaluate(
    run: Annotated[str, typer.Argument(help="The folder of a run, or any other model.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, with commas between them: arc_easy,gsm8k.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task at most.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The model before (default: the run's base model).")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put questions through the chat template; lm-eval does not.")
    ] = False,
    include: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as lm-eval's YAML.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    as_json: AsJson = False,
) -> None:
    """Public benchmarks by name, before and after, with paired intervals (through lm-eval)."""
    from luthier.report.console import Console
    from luthier.serve.benchmarks import evaluate

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    result = evaluate(run, names, limit=limit, base=base, chat=chat, include=include, shots=shots)
    if as_json:
        typer.echo(dumped(result))
        return
    Console().benchmarks(result)
    if (Path(run) / "report.html").is_file():
        typer.echo(f"Report: {Path(run) / 'report.html'}")
