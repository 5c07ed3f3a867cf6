"""The command line, `luthier`."""

from luthier.cli.commands import app, main

__all__ = ["app", "main"]
