"""The command line: its commands in their groups, how a refusal is shown, and the entry point. What a command
does lies in the module it calls, imported only then.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperGroup

from luthier import compat
from luthier.cli import catalogue, measuring, studies, tools, training, use
from luthier.cli.tools import COMPLETE
from luthier.compat.lazy_imports import READER, after, rarely, read_once
from luthier.errors import PluginWarning, RecipeError, outcome_of
from luthier.report.streams import steady
from luthier.storage.failure import report_outcome

# command -> former name of an option -> its name; former names are accepted, and left out of the help
FORMER_OPTIONS = {
    "tune": {"--until": "--stop-at"},
    "data": {"--shown": "--examples"},
    "compare": {"--to": "--output-dir"},
    "search": {"--over": "--space", "--where": "--constraint", "--to": "--output-dir"},
    "export": {"--to": "--output-dir"},
    "bench": {"--to": "--output-dir"},
    "docs": {"--to": "--output-dir"},
}

# heading of the help -> its commands
GROUPS = {
    "Train": (training.tune, training.explain),
    "Rows and methods": (measuring.data, catalogue.methods, catalogue.papers, tools.import_configuration),
    "Measure": (measuring.inspect, measuring.evaluate),
    "Compare and search": (studies.compare, studies.search, studies.reproduce, studies.bench),
    "Use": (use.chat, use.serve, use.export, use.merge, use.push, use.studio),
    "This machine": (catalogue.doctor, tools.completion),
}
NAMES = {tools.import_configuration: "import"}  # where the name is Python's own word
HIDDEN = {"claims": studies.reproduce, "docs": tools.docs}  # a former name, and what only developers call


class Commands(TyperGroup):
    """The commands. A refusal is one sentence on stderr with exit code 2; Ctrl-C exits with 130. Former names
    of options are read as their names.
    """

    def resolve_command(self, ctx, args):
        name, command, rest = super().resolve_command(ctx, args)
        former = FORMER_OPTIONS.get(name or "", {})
        words = []
        for i, word in enumerate(rest):
            if word == "--":  # what follows is no option
                return name, command, words + rest[i:]
            option, equals, value = word.partition("=")
            words.append(former.get(option, option) + equals + value)
        return name, command, words

    def invoke(self, ctx):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of other libraries to their developers
                warnings.showwarning = plugins_in_one_line(warnings.showwarning)
                return super().invoke(ctx)
        except KeyboardInterrupt:
            message = "stopped"
            if ctx.invoked_subcommand in ("tune", "search", "compare"):
                message += "; run the same command again to continue"
            if ctx.invoked_subcommand == "tune":
                message += " from its last checkpoint"
            typer.echo(f"\nluthier: {message}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            outcome = outcome_of(error)
            if not isinstance(outcome, RecipeError):
                raise
            report_outcome(outcome)
            typer.echo(f"luthier: {outcome}", err=True)
            raise typer.Exit(2) from None


def plugins_in_one_line(show: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: of other packages' methods without the place in luthier's code."""

    def show_warning(message, category, *place, **where):
        if issubclass(category, PluginWarning):
            typer.echo(f"luthier: {message}", err=True)
        else:
            show(message, category, *place, **where)

    return show_warning


app = typer.Typer(
    cls=Commands,
    name="luthier",
    help="Fine-tune foundation models from one YAML recipe, and measure what changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from luthier.version import __version__

        typer.echo(f"luthier {__version__}")
        raise typer.Exit


for heading, commands in GROUPS.items():
    for command in commands:
        app.command(NAMES.get(command), rich_help_panel=heading)(command)
for name, command in HIDDEN.items():
    app.command(name, hidden=True)(command)


def main() -> None:
    output = steady()
    compat.keep()
    rarely()
    after(READER, read_once)
    if COMPLETE in os.environ:  # a shell asks what could follow
        from typer.completion import completion_init

        completion_init()
    try:
        app()
    finally:
        if output is not None:
            output.flush()
            if output.failure is not None and not isinstance(output.failure, BrokenPipeError):
                typer.echo(f"luthier: standard output could not be written: {output.failure}", err=True)
                sys.exit(1)
