"""The report of a run, as Python holds it and as report.json holds it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import Damaged
from luthier.storage import files
from luthier.storage.layout import REPORT


@dataclass
class Report:
    """What a run measured; also in its folder, as report.json.

    Attributes:
        folder: of the run.
        before: metrics before training, by name; losses in nats a token, shares from 0 to 1.
        after: metrics after training.
        losses: the loss of each logged step.
        stats: numbers of rows and tokens, seconds, memory, parameters.
        notes: the warnings of the run.
        runs: of a plan, the folders of its runs.
    """

    folder: str
    before: dict[str, float] = field(default_factory=dict)  # metrics before training
    after: dict[str, float] = field(default_factory=dict)  # metrics after training
    losses: list[float] = field(default_factory=list)  # of each logged step
    stats: dict[str, Any] = field(default_factory=dict)  # rows, tokens, seconds, memory, parameters
    notes: list[str] = field(default_factory=list)  # the warnings of the run
    runs: list[str] = field(default_factory=list)  # of a plan: the folders of its runs

    @staticmethod
    def read(folder: str | Path) -> Report:
        """The report in a run's folder, also one that version 0.1 wrote. Raises Damaged where it is missing
        or is none.
        """
        path = Path(folder) / REPORT
        values = files.read_object(path, **_TYPES)
        runs = [str(path) for path in plan_runs(values)]
        values.pop("acts", None)
        try:
            return Report(**{**values, "runs": runs})
        except TypeError as error:
            raise Damaged(f"{path} is damaged: {error}") from None

    @property
    def acts(self) -> list[str]:
        """The former name of `runs`."""
        warnings.warn("Report.acts is now called runs", DeprecationWarning, stacklevel=2)
        return self.runs

    def write(self, folder: Path) -> None:
        files.write_json(folder / REPORT, asdict(self))


def plan_runs(report: Mapping[str, Any]) -> list[Path]:
    """The folders of a plan's runs, by the content of its report.json; none of a single run.

    Version 0.1 called them acts.
    """
    return [Path(folder) for folder in report.get("runs") or report.get("acts") or ()]


_TYPES = {"folder": str, "before": dict, "after": dict, "losses": list, "stats": dict, "notes": list}
