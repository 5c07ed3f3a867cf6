"""README.md of a run folder: a model card as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from luthier.report.numbers import cost, headline, lines
from luthier.report.page import name_of, versions


def card(recipe: Any, report: Any, folder: Path) -> str:
    """Front matter, what it is, numbers, how to load it."""
    library = _library(folder)
    front = {"library_name": library, "license": "unknown", "tags": ["luthier", *_tags(recipe)]}
    if _on_hub(recipe.model):
        front = {"base_model": recipe.model, **front}
    on = report.stats.get("measured_on", "held-out rows")
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n",
        f"# {_inline(name_of(recipe))}\n",
        f"Tuned with luthier from {_inline(_base(recipe.model))}. {_inline(headline(report))}\n",
    ]
    if every := lines(report):
        parts += [
            f'Measured on {on}; "elsewhere" is what the model could do before, outside of what was tuned.\n'
        ]
        parts += ["| | before | after | change |\n| - | -: | -: | -: |"]
        parts += [f"| {_inline(x.label)} | {x.before} | {x.after} | {x.change} |" for x in every]
        parts += [""]
    parts += [f"- {what}: {much}" for what, much in cost(report.stats)]
    parts += [
        "\n## Use it\n",
        _use(library, report.stats.get("auto_class", "AutoModelForCausalLM")),
        "\n## Made with\n",
    ]
    parts += [
        ", ".join(f"{what} {who}" for what, who in versions())
        + f"; recipe fingerprint {recipe.fingerprint()}."
    ]
    parts += [
        "The whole recipe lies beside this file: `recipe.yaml`. The licence of the base model and of the data"
        " applies.\n"
    ]
    return "\n".join(parts)


def _library(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "peft"
    return "transformers" if (folder / "config.json").is_file() else "luthier"


def _tags(recipe: Any) -> list[str]:
    said = name_of(recipe).split(", ")[1:]
    return list(dict.fromkeys(w for part in said for w in re.findall(r"[A-Za-z]\w*", part)))


def _on_hub(model: str) -> bool:
    """Only a hub name may stand as base_model: a folder of somebody's disk means nothing elsewhere."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()


def _base(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model


def _inline(text: str) -> str:
    """User text in Markdown: no HTML, no table cells of its own."""
    return re.sub(r"([|<>`*_\[\]\\])", r"\\\1", text.replace("\n", " "))


USES = {
    "peft": (
        """With peft:

```python
import luthier
from peft import AutoPeftModelForCausalLM

luthier.register_peft()  # luthier's own tuners become PEFT types

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
```
"""
    ),
    "transformers": (
        """With transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```
"""
    ),
    "luthier": "",
}


def _use(library: str, auto_class: str) -> str:
    writes = auto_class not in ("AutoModelForSequenceClassification", "AutoModelForMaskedLM")
    asks = 'print(model.generate("..."))\n' if writes else ""
    code = f'```python\nimport luthier\n\nmodel = luthier.load("FOLDER")\n{asks}```\n\n'
    ours = code + ("or `luthier chat FOLDER`. " if writes else "") + "`FOLDER` is where this file lies.\n"
    if library == "transformers":
        return f"{ours}\n{USES[library].replace('AutoModelForCausalLM', auto_class)}"
    return f"{ours}\n{USES[library]}" if USES[library] and auto_class == "AutoModelForCausalLM" else ours
