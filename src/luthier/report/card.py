"""README.md of a run folder: a model card as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

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
    methods = re.findall(r"[A-Za-z]\w*", " ".join(run_title(recipe).split(", ")[1:]))
    tags = list(dict.fromkeys(["luthier", *methods]))
    front: dict[str, Any] = {"library_name": library, "license": "unknown", "tags": tags}
    model = recipe.model
    if Path(model).is_absolute():
        model = Path(model).name
    # only a hub name may stand as base_model: a folder of somebody's disk means nothing on another
    if re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model) and not Path(recipe.model).exists():
        front = {"base_model": recipe.model, **front}
    return render(
        "card.md.j2",
        front=yaml.safe_dump(front, sort_keys=False),
        title=run_title(recipe),
        model=model,
        headline=" ".join(filter(None, (headline(report), sentence(read_skills(folder))))),
        measured_on=report.stats.get("measured_on", HELD_OUT),
        metrics=metric_rows(report),
        cost=list(cost(report.stats)),
        library=library,
        auto_class=auto_class,
        generates=auto_class not in SCORERS,
        versions=versions(),
        fingerprint=recipe.fingerprint(),
    )
