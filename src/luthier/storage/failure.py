"""What a run failed of, as failed.json in its folder: written by the run, read by whoever waits for it
elsewhere, without what it takes to run one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from luthier.errors import DiskError, RecipeError, from_code
from luthier.storage import files
from luthier.storage.layout import FAILED

# names the file in which a command leaves its outcome for the process that started it
OUTCOME_FILE = "LUTHIER_OUTCOME_FILE"


def write_failure(folder: Path, error: Exception) -> None:
    """Leave {code, message} in the folder of a run that failed, for whoever waits for it elsewhere."""
    _write(folder / FAILED, error)


def read_failure(folder: Path) -> RecipeError | None:
    """What the run in this folder failed of, as its type; None where it did not, or has gone on since."""
    return read_outcome(folder / FAILED)


def report_outcome(error: Exception) -> None:
    """Leave {code, message} of a command that is refused, perhaps before it owns a folder, for the process
    that started it, where that has asked for it.
    """
    path = os.environ.get(OUTCOME_FILE)
    if path:
        _write(Path(path), error)


def read_outcome(path: Path) -> RecipeError | None:
    """What such a file says, as its type; None where there is none."""
    if not path.is_file():
        return None
    outcome = files.read_object(path, code=str, message=str)
    return from_code(outcome["code"], outcome["message"])


def _write(path: Path, error: Exception) -> None:
    outcome = {"code": "crash", "message": f"{type(error).__name__}: {error}"}
    if isinstance(error, RecipeError):
        outcome = {"code": error.code, "message": str(error)}
    with suppress(DiskError):  # a full disk may be what it failed of
        files.write_json(path, outcome)
