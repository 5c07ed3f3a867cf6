"""README.md of a run folder and of an export: a model card as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from luthier.model.licence import licence_of
from luthier.registry import spec
from luthier.report.html import render
from luthier.report.numbers import HELD_OUT, cost, headline, metric_rows
from luthier.report.retention import read_skills, sentence
from luthier.report.text import run_title, versions

SCORERS = (
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
)  # auto classes of models that generate nothing


def card(recipe: Any, report: Any, folder: Path) -> str:
    """Front matter, what it is, metrics, how to load it."""
    library = "luthier"
    if (folder / "adapter_config.json").is_file():
        library = "peft"
    elif (folder / "config.json").is_file():
        library = "transformers"
    auto_class = report.stats.get("auto_class", "AutoModelForCausalLM")
    return render(
        "card.md.j2",
        front=front(recipe, {"library_name": library}),
        library=library,
        auto_class=auto_class,
        generates=auto_class not in SCORERS,
        versions=versions(),
        fingerprint=recipe.fingerprint(),
        **facts(recipe, report, folder),
    )


def export_card(
    recipe: Any, report: Any, folder: Path, form: Any, usage: Sequence[Any], closeness: str
) -> str:
    """The card of an exported form: what it is, the run's metrics, how it is used. folder: of the run. form:
    the exporter. usage: a tool and what to type each; `FOLDER` stands for the form's own folder. closeness:
    how far it is from the tuned model, in words.
    """
    entries = {"base_model_relation": form.relation, "library_name": form.library}
    return render(
        "export_card.md.j2",
        front=front(recipe, entries),
        form=spec(form),
        usage=usage,
        closeness=closeness,
        versions=versions(),
        licence=licence_of(recipe.model)["license"],
        **facts(recipe, report, folder),
    )


def front(recipe: Any, entries: Mapping[str, Any]) -> str:
    """The front matter that the hub reads; the licence is the base model's."""
    methods = re.findall(r"[A-Za-z]\w*", " ".join(run_title(recipe).split(", ")[1:]))
    values: dict[str, Any] = {**entries, **licence_of(recipe.model)}
    values["tags"] = list(dict.fromkeys(["luthier", *methods]))
    # only a hub name may stand as base_model: a folder of somebody's disk means nothing on another
    if re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model) and not Path(recipe.model).exists():
        values = {"base_model": recipe.model, **values}
    else:
        values.pop("base_model_relation", None)
    return yaml.safe_dump(values, sort_keys=False)


def facts(recipe: Any, report: Any, folder: Path) -> dict[str, Any]:
    """What was tuned on what, and what was measured. folder: of the run."""
    model, title = recipe.model, run_title(recipe)
    if Path(model).is_absolute():
        model = Path(model).name
        title = title.replace(str(recipe.model), model, 1)
    sentences = []
    if report.stats:
        sentences = [headline(report), sentence(read_skills(folder))]
    return {
        "title": title,
        "model": model,
        "headline": " ".join(filter(None, sentences)),
        "measured_on": report.stats.get("measured_on", HELD_OUT),
        "metrics": metric_rows(report),
        "cost": list(cost(report.stats)),
    }
