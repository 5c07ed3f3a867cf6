"""What there is: methods, papers, and what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.options import AsJson, dumped, show
from luthier.errors import RecipeError


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method: what it does, and its settings.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="List one kind: tuner, objective, transform, ...")] = None,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Table of tuners with their capabilities (tested now) and trainable parameters (%)"
            " on a Llama-7B.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List every method (tuners, objectives, optimizers, ...), or describe one."""
    if name and not (wide or as_json):
        from luthier.recipe import catalogue
        from luthier.tools.method_page import terminal_page

        typer.echo("\n".join(catalogue.pages(name, kind, terminal_page)).rstrip())
        return
    if wide:
        if kind not in (None, "tuner"):
            raise RecipeError(f"--wide shows a table of tuners; there is none for {kind}s")
        from luthier.tools import capability_matrix as abilities

        show(abilities.tuners(), as_json, abilities.WIDE)
        return
    from luthier.recipe import catalogue

    rows = [m for m in catalogue.methods(kind) if name in (None, m["name"])]
    show(rows, as_json, ("kind", "name", "paper", "summary"))


def papers(
    word: Annotated[
        str | None, typer.Argument(help="A paper's short name, or text in the title, kind, family or method.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers of the catalogue, and which method implements each. With a paper's short name: what of
    it is there, what is not, and the tests that show it.
    """
    from luthier.recipe import catalogue

    if word and not as_json and (lines := catalogue.paper_page(word)):
        typer.echo("\n".join(lines))
        return
    show(catalogue.papers(word), as_json, ("row", "title", "kind", "family", "by"))


def doctor(as_json: AsJson = False) -> None:
    """Report what is installed, what this machine can do, and what is missing for each extra."""
    from luthier.tools import doctor

    facts = doctor.examine()
    if as_json:
        typer.echo(dumped(facts))
    else:
        typer.echo(doctor.summary(facts))
