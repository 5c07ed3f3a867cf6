"""Write what a run tuned for other tools, load it back, and compare its answers."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.compat.transformers import quiet
from luthier.errors import RecipeError
from luthier.methods.exporters._base import Exporter, Usage
from luthier.methods.tuners._base import Untuned
from luthier.model.licence import fetch_card, licence_files
from luthier.model.loaded import load
from luthier.registry import build, did_you_mean, names
from luthier.report.card import export_card
from luthier.run.report import Report
from luthier.serve.agreement import LARGE, Agreement
from luthier.serve.source import Source
from luthier.storage import files
from luthier.storage.layout import REPORT

# forms that people ask for, and what leads to them
BY_OTHERS = {
    "onnx": "optimum's exporter (optimum-onnx) asks for transformers below 5, and luthier for 5 or later:"
    " export --as merged, and run `optimum-cli export onnx --model DIR OUT` in an environment of its own",
}


@dataclass(frozen=True)
class Exported:
    """What was written. usage: how it is used, a tool each. moved: how far tuning changed log-probabilities.
    """

    folder: Path
    agreement: Agreement
    moved: float | None
    notes: list[str] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)

    def __str__(self) -> str:
        close = self.agreement.sentence(self.moved)
        sentence = f"exported to {self.folder}; loaded again, its outputs match the tuned model's ({close})"
        return "; ".join([sentence, *self.notes])


def export(folder: str | Path, form: Any, to: str | Path, dtype: str | None = None) -> str:
    """As `export_form`, with what was written in a sentence for people."""
    return str(export_form(folder, form, to, dtype))


def export_form(folder: str | Path, form: Any, to: str | Path, dtype: str | None = None) -> Exported:
    """Write a run's result for other tools, load it back, and compare its answers with the tuned model's.

    Args:
        folder: of a finished run.
        form: an exporter by name, or {name: gguf, quantization: q8_0}.
        to: a folder that does not exist or is empty.
        dtype: in which floats are written, where the form has a choice: float32, bfloat16 or float16; by
            default what the run computed in.

    Returns:
        what was written, how far its answers differ from the tuned model's, and how it is used.

    Raises:
        RecipeError: it has no such form, what was written differs from the tuned model by more than
            rounding, or rounding undoes most of what tuning changed; then nothing is left at `to`.
    """
    exporter = exporter_of(form)
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RecipeError(f"{to} already exists and is not empty; use another folder")
    if dtype is not None and dtype not in exporter.dtypes:
        choices = ", ".join(exporter.dtypes) or "left out"
        raise RecipeError(f"dtype: {dtype} must be {choices} for --as {exporter.name}")
    loaded = load(folder, dtype="float32")
    if isinstance(loaded.roles.tuner, Untuned):
        raise RecipeError(f"{folder} is not the folder of a run: it has no tuned weights")
    scratch = to.with_name(f"{to.name}.{os.getpid()}.part")
    source = Source(Path(folder), loaded, dtype, scratch)
    exporter.check(source)
    try:
        with files.new_folder(to) as beside, quiet():
            exporter.write(source, beside)
            agreement = compare(exporter, source, beside)
            exporter.finish(source, beside)
            write_card(exporter, source, beside, agreement)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    notes = [*source.notes, *loaded.notes]
    return Exported(to, agreement, source.probe.moved, notes, exporter.usage(source, to, str(to)))


def exporter_of(form: Any) -> Exporter:
    """Raises RecipeError where there is no such form, or it has no such settings."""
    name = form.get("name") if isinstance(form, dict) else form
    if isinstance(name, str) and name not in names("exporter"):
        hint = BY_OTHERS.get(name)
        if hint is not None:
            raise RecipeError(f"there is no export format '{name}': {hint}")
        raise RecipeError(f"there is no export format '{name}'{did_you_mean(name, names('exporter'))}")
    return build("exporter", form)


def compare(exporter: Exporter, source: Source, folder: Path) -> Agreement:
    """Read the form back and compare it with the tuned model. Raises Refused where they differ by more than
    the form's rounding.
    """
    limits, probe = exporter.limits(source, folder), source.probe
    form = exporter.read(source, folder)
    if limits.weights is None:
        return probe.check(form, exporter.name, limits.logprobs)
    agreement = probe.check_rounded(form, exporter.reference(source), exporter.name, limits)
    if probe.moved is not None and agreement.mean > LARGE * probe.moved:
        source.notes.append(
            f"rounding to {exporter.name} changes log-probabilities by {agreement.mean:.1e} on average, and"
            f" tuning changed them by {probe.moved:.1e}: measure it on your rows before you use it"
        )
    return agreement


def write_card(exporter: Exporter, source: Source, folder: Path, agreement: Agreement) -> None:
    """README.md: the run's model card, with what this form is, how far it is from the tuned model, and how it
    is used; and the base's licence.
    """
    report, recipe = Report(str(source.folder)), source.loaded.recipe
    if (source.folder / REPORT).is_file():
        report = Report.read(source.folder)
    fetch_card(recipe.model)
    usage = exporter.usage(source, folder, "FOLDER")
    closeness = agreement.sentence(source.probe.moved)
    card = export_card(recipe, report, source.folder, exporter, usage, closeness)
    files.write_text(folder / "README.md", card)
    for name, text in licence_files(recipe.model).items():
        files.write_text(folder / name, text)
