"""What a run failed of, as failed.json in its folder: written by the run, read by whoever waits for it
elsewhere, without what it takes to run one.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from luthier.errors import DiskError, RecipeError, from_code
from luthier.storage import files
from luthier.storage.layout import FAILED


def write_failure(folder: Path, error: Exception) -> None:
    """Leave {code, message} in the folder of a run that failed, for whoever waits for it elsewhere."""
    outcome = {"code": "crash", "message": f"{type(error).__name__}: {error}"}
    if isinstance(error, RecipeError):
        outcome = {"code": error.code, "message": str(error)}
    with suppress(DiskError):  # a full disk may be what it failed of
        files.write_json(folder / FAILED, outcome)


def read_failure(folder: Path) -> RecipeError | None:
    """What the run in this folder failed of, as its type; None where it did not, or has gone on since."""
    if not (folder / FAILED).is_file():
        return None
    outcome = files.read_json(folder / FAILED)
    return from_code(outcome["code"], outcome["message"])
