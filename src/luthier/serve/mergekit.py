"""mergekit's YAML as a merge of ours: the merge methods that both have, under mergekit's defaults.

What has no counterpart is refused, all of it in one sentence. mergekit's `ties` divides by the weights that
agree, as ours does; its `dare_ties` and `breadcrumbs_ties` add up what agrees unless `normalize: true`, which
ours cannot, so they are read with `normalize: true` only. `int8_mask` saves mergekit memory and is
passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.storage.bounded_yaml import read_yaml

KEYS = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype"}
DTYPES = ("float32", "bfloat16", "float16")
# merge method -> our merger with its settings; what a method takes beside a model, and for all of them
MERGERS: dict[str, dict[str, Any]] = {
    "linear": {"name": "average"},
    "task_arithmetic": {"name": "task_arithmetic"},
    "ties": {"name": "ties"},
    "dare_linear": {"name": "dare"},
    "dare_ties": {"name": "dare", "ties": True},
    "breadcrumbs": {"name": "breadcrumbs"},
    "breadcrumbs_ties": {"name": "breadcrumbs", "ties": True},
    "slerp": {"name": "slerp"},
}
OF_MODEL = {"linear": {"weight"}, "slerp": set(), "task_arithmetic": {"weight"}}
OF_ALL = {"linear": {"normalize"}, "slerp": {"t"}}
THINNED = {"weight", "density"}
NORMALIZE = {  # what mergekit takes where nothing is said -> what ours does
    "linear": (True, True),
    "task_arithmetic": (False, False),
    "ties": (True, True),
    "dare_linear": (False, False),
    "dare_ties": (False, True),
    "breadcrumbs": (False, False),
    "breadcrumbs_ties": (False, True),
}


@dataclass(frozen=True)
class Merge:
    """What is merged, and how. models and base: folders. merger: as in a recipe. dtype: of the result."""

    merger: Any
    models: list[str]
    base: str | None = None
    dtype: str | None = None


@dataclass
class Reader:
    """One configuration, and everything in it that has no counterpart."""

    config: dict[str, Any]
    odd: list[str] = field(default_factory=list)

    def merge(self) -> Merge:
        config, method = self.config, self.config.get("merge_method")
        self.odd += [str(key) for key in config if key not in KEYS]
        if method not in MERGERS:
            self.odd.append(f"merge_method {method}")
        models, base = self.models(), config.get("base_model")
        if base is not None and not isinstance(base, str):
            self.odd.append("base_model, which is no folder")
        if method not in ("linear", "slerp"):
            models = [model for model in models if model[0] != base]
        dtype = config.get("out_dtype") or config.get("dtype")
        if dtype is not None and dtype not in DTYPES:
            self.odd.append(f"dtype {dtype}")
        settings = self.settings(method, models) if method in MERGERS else {}
        folders = [folder for folder, _ in models]
        if method == "slerp":
            folders = [base, *[folder for folder in folders if folder != base]]
            if base is None or len(folders) != 2:
                self.odd.append("slerp of other than base_model and one more model")
        self.check()
        needs_base = method not in ("linear", "slerp")
        return Merge(settings, folders, base if needs_base else None, dtype)

    def check(self) -> None:
        """Raises RecipeError, where anything has no counterpart."""
        if self.odd:
            raise RecipeError(f"luthier merge does not read this of mergekit's YAML: {'; '.join(self.odd)}")

    def models(self) -> list[tuple[str, dict[str, Any]]]:
        """Folder and parameters of each model."""
        entries, models = self.config.get("models"), []
        if not isinstance(entries, list) or not entries:
            self.odd.append("no list of models")
            entries = []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
                self.odd.append(f"models[{number}], which has no model")
                continue
            self.odd += [f"models[{number}].{key}" for key in entry if key not in ("model", "parameters")]
            models.append(
                (entry["model"], self.mapping(entry.get("parameters"), f"models[{number}].parameters"))
            )
        return models

    def mapping(self, value: Any, name: str) -> dict[str, Any]:
        if value is not None and not isinstance(value, dict):
            self.odd.append(name)
        return value if isinstance(value, dict) else {}

    def settings(self, method: str, models: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """Our merger with its settings."""
        shared = self.mapping(self.config.get("parameters"), "parameters")
        of_model = OF_MODEL.get(method, THINNED | ({"gamma"} if "breadcrumbs" in method else set()))
        of_all = of_model | OF_ALL.get(method, {"normalize", "lambda"}) | {"int8_mask"}
        if "dare" in method:
            of_all |= {"rescale"}
        self.odd += [f"parameters.{key}" for key in shared if key not in of_all]
        for number, (_, own) in enumerate(models):
            self.odd += [f"models[{number}].parameters.{key}" for key in own if key not in of_model]
        self.check_sums(method, shared)
        settings = dict(MERGERS[method])
        if method == "slerp":
            settings["t"] = self.number(shared.get("t"), "parameters.t")
            return settings
        weights = [own.get("weight", shared.get("weight")) for _, own in models]
        settings["weights"] = [self.number(w, f"weight of model {k}") for k, w in enumerate(weights)]
        if "ties" in method and min(settings["weights"], default=0.0) < 0:
            self.odd.append(f"{method} with a negative weight")  # mergekit divides by a sum with signs
        if method != "linear":
            scale = "alpha" if "breadcrumbs" in method else "scale"
            settings[scale] = self.number(shared.get("lambda", 1.0), "parameters.lambda")
        if "density" in of_model:
            density = self.one_for_all("density", 1.0, models, shared)
            if "breadcrumbs" in method:
                top = min(self.one_for_all("gamma", 0.01, models, shared), 1 - density)
                settings |= {"beta": max(0.0, 1 - density - top), "gamma": 1 - top}
            else:
                settings["density"] = density
        return settings

    def check_sums(self, method: str, shared: dict[str, Any]) -> None:
        """Notes a `normalize` or `rescale` that ours does not do."""
        default, ours = NORMALIZE.get(method, (None, None))
        normalize = shared.get("normalize", default)
        if normalize != ours:
            self.odd.append(f"{method} with normalize: {str(normalize).lower()}")
        if shared.get("rescale", True) is not True:
            self.odd.append("parameters.rescale: false")

    def number(self, value: Any, name: str) -> float:
        """A number; lists (gradients over layers), filters and what lacks are noted."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        self.odd.append(f"{name}, which is {'not there' if value is None else 'no single number'}")
        return 1.0

    def one_for_all(self, key: str, default: float, models: Any, shared: dict[str, Any]) -> float:
        """A value that all models must share."""
        values = {self.number(own.get(key, shared.get(key, default)), key) for _, own in models}
        if len(values) > 1:
            self.odd.append(f"models with different {key}")
        return min(values, default=default)


def read_mergekit(path: Path) -> Merge:
    """A merge from mergekit's YAML. Raises RecipeError, which names all that has no counterpart."""
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: expected a mapping with merge_method and models")
    return Reader(config).merge()
