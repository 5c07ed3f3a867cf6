"""What fine-tuning changed: two models on the same rows, and their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.data.load import load_data
from luthier.errors import RecipeError
from luthier.methods.evaluators._base import paired, run_all
from luthier.methods.tuners._base import Untuned
from luthier.model.loaded import Loaded, load
from luthier.model.weight_changes import plain_matrices, weight_changes
from luthier.recipe.recipe import Recipe
from luthier.registry import build, evaluator_of
from luthier.report import checkup
from luthier.report.changes import Condition, measured_changes
from luthier.report.retention import read_skills
from luthier.run.folder import rows_fingerprint
from luthier.storage import files
from luthier.train import checks

EVALUATORS = ("loss", "accuracy", "forgetting")  # with which two models are compared
PAGE_EVALUATORS = ("generate", "calibration", "diversity", "refusals")  # and for a page
# keys of a recipe with which both models read the rows
INSPECTED = ("max_length", "chat_template", "chat_template_kwargs", "split_special_tokens", "dtype")
WHEN = {"base": "before", "tuned": "after"}


def inspect(
    base: str | Path,
    tuned: str | Path,
    data: Any = None,
    *,
    preference: bool = False,
    report: str | Path | None = None,
    fail_if: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate two models on the same rows.

    Args:
        base: the model before: a folder, a hub name, toy:NAME or a run.
        tuned: the model after.
        data: as in a recipe; by default what the run `tuned` held out, or trained on where it held nothing
            out.
        preference: measure how both rank pairs as well, with `base` as the reference (evaluator
            `preference`).
        report: an HTML page to write; for it answers, calibration and diversity are measured too, and the
            weights are compared (`weights` of the result).
        fail_if: conditions such as 'retention < -2' (report/changes.py); what they need is measured, and
            those that hold stand in `failed` of the result.

    Returns:
        {base: {model, metrics}, tuned: {model, metrics}, rows, measured_on, notes, changes, skills, failed};
        losses in nats a token, shares from 0 to 1. changes: of each metric that is a mean over rows, skills:
        of what both can do beside the task; each {skill, metric, rows, before, after, difference, low, high}.

    Raises:
        RecipeError: a model cannot be loaded, or `preference` and no row has a better and a worse completion.
    """
    if report is not None and Path(report).is_dir():
        page = Path(report) / "inspect.html"
        raise RecipeError(f"--report: {report} is a folder; give a file name, such as {page}")
    conditions = [Condition.parse(text) for text in fail_if]
    rows, measured_on, settings = rows_of(tuned, data)
    evaluators = (*EVALUATORS, *PAGE_EVALUATORS) if report is not None else EVALUATORS
    needed = filter(None, (evaluator_of(condition.name) for condition in conditions))
    with tempfile.TemporaryDirectory(prefix="luthier-inspect-") as folder:
        comparison = Comparison(rows, settings, Path(folder), preference, page=report is not None)
        comparison.evaluators = tuple(dict.fromkeys((*evaluators, *needed)))
        result: dict[str, Any] = {}
        for who, name in (("base", base), ("tuned", tuned)):
            result[who] = comparison.measure(who, name)
        if preference:
            comparison.add_preferences(result)
        notes = comparison.finish()
        result |= {"rows": result["tuned"]["rows"], "measured_on": measured_on, "notes": notes}
        result["changes"] = [asdict(change) for change in measured_changes(folder)]
        result["skills"] = [asdict(skill) for skill in read_skills(folder)]
        result["failed"] = [condition.text for condition in conditions if condition.holds(result)]
        if report is not None:
            result["weights"] = comparison.weights
            files.write_text(Path(report), checkup.page(result, Path(folder)))
    return result


def rows_of(tuned: str | Path, data: Any) -> tuple[list[dict], str, dict[str, Any]]:
    """Rows, what they are, and the settings with which both models must read them."""
    path = Path(tuned) / "recipe.yaml"
    recipe = Recipe.load(path) if path.is_file() else Recipe()
    settings = {key: getattr(recipe, key) for key in INSPECTED}
    if data is not None:
        return load_data(Recipe(data=data, eval_data=0)).rows, "rows", settings
    if not path.is_file():
        raise RecipeError(
            f"{tuned} is not the folder of a run, so it has no held-out rows; pass rows with --data"
        )
    split = load_data(recipe, fingerprint=rows_fingerprint(Path(tuned)))
    if split.held_out:
        return split.held_out, "held-out rows", settings
    return split.rows[:256], "training rows", settings


@dataclass
class Comparison:
    """Both models in turn on the same rows, each loaded for as long as it is measured."""

    rows: list[dict]
    settings: dict[str, Any]  # with which both read them
    folder: Path  # both are measured on the same texts elsewhere, which are kept here
    preference: bool
    page: bool
    evaluators: tuple[str, ...] = EVALUATORS
    notes: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)
    vocabularies: list[dict] = field(default_factory=list)
    totals: list[Any] = field(default_factory=list)  # of pairs
    weights: dict[str, Any] | None = None

    def measure(self, who: str, name: str | Path) -> dict[str, Any]:
        """Load a model and evaluate it: {model, metrics, rows}."""
        loaded = load(name, **self.settings)
        self.notes += [f"{name}: {note}" for note in loaded.notes]
        self.check_architecture(name, loaded)
        architecture = loaded.roles.policy.architecture
        usable, bad, _ = architecture.encode_all(self.rows, loaded.roles.renderer)
        if not usable:
            first = bad[0]["reason"]
            raise RecipeError(
                f"{name} can use none of the {len(self.rows)} rows; reason for the first: {first}"
            )
        checks.check_forward(loaded.roles.policy, loaded.roles.batch(usable[:2]), self.notes.append)
        self.vocabularies.append(loaded.tokenizer.get_vocab())
        metrics = evaluate(self.evaluators, loaded, usable, self.folder, WHEN[who])
        if self.preference:
            self.totals.append(
                build("evaluator", "preference").totals(loaded.roles.policy, loaded.roles, paired(usable))
            )
        del loaded
        if self.page:
            self.compare_weights(who, name)
        return {"model": str(name), "metrics": metrics, "rows": len(usable)}

    def check_architecture(self, name: str | Path, loaded: Loaded) -> None:
        """Refuse two models that do not read rows in the same way."""
        self.models.append(str(name))
        self.architectures.append(loaded.roles.policy.architecture.name)
        if self.architectures[0] != self.architectures[-1]:
            (base, tuned), (first, second) = self.models, self.architectures
            raise RecipeError(
                f"{base} is loaded as architecture {first}, but {tuned} as {second}: their"
                " numbers cannot be compared"
            )

    def add_preferences(self, result: dict[str, Any]) -> None:
        """How both models rank pairs, with the base as the reference."""
        if None in self.totals:
            raise RecipeError(
                "--preference needs rows with a chosen and a rejected completion; pass them with --data"
            )
        evaluator = build("evaluator", "preference")
        base, tuned = self.totals
        result["base"]["metrics"] |= evaluator.compare(base, base)
        result["tuned"]["metrics"] |= evaluator.compare(tuned, base)

    def compare_weights(self, who: str, name: str | Path) -> None:
        """Of the base: its matrices, kept in the folder. Of the tuned model: what changed against them."""
        from safetensors.torch import load_file, save_file

        path = self.folder / "base.safetensors"
        try:  # in fewer bits, what was not trained would seem to have changed when merged
            loaded = load(name, **{**self.settings, "dtype": "float32"})
            tuner = loaded.roles.tuner
            merged: Any = nullcontext(loaded.model) if isinstance(tuner, Untuned) else tuner.merged()
            with merged as model:
                if who == "base":
                    matrices = plain_matrices(model).items()
                    save_file({n: p.detach().cpu().contiguous() for n, p in matrices}, str(path))
                elif path.is_file():
                    self.weights = weight_changes(load_file(str(path)), model)
        except RecipeError as error:  # what cannot be merged has no weights to compare
            self.notes.append(f"weights are not compared: {error}")

    def finish(self) -> list[str]:
        """Every note, once."""
        if self.vocabularies[0] != self.vocabularies[1]:
            self.notes.append("the two models use different tokenizers: compare accuracy, not loss")
        return list(dict.fromkeys(self.notes))


@torch.no_grad()
def evaluate(
    names: tuple[str, ...], loaded: Loaded, rows: list[dict], folder: Path, when: str
) -> dict[str, float]:
    """What those evaluators measure that this architecture has all for."""
    available = loaded.roles.policy.architecture.provides | {"completions"}
    evaluators = [build("evaluator", name) for name in names]
    usable = [evaluator for evaluator in evaluators if evaluator.requires <= available]
    return run_all(usable, loaded.roles, rows, folder, when)
