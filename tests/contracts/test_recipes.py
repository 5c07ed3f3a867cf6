"""Every recipe of recipes/ is short, legal, and runs: a few steps on a small model."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

import luthier
from helpers.paths import ROOT
from luthier import toy
from luthier.data.load import load_data
from luthier.recipe.recipe import Recipe
from luthier.registry import find

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def case(path: Path):
    """A recipe as a case; a plan is several runs, and test_plans.py runs each one, smaller."""
    is_plan = "plan" in yaml.safe_load(path.read_text(encoding="utf-8"))
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if is_plan else [])


# what a model must know something for: answers of its own, of which some are right
ANSWERS = {"plan", "stages", "online_stages"}


@pytest.fixture(scope="session")
def little(tmp_path_factory) -> str:
    """A model that knows nothing, of half the width of toy:lm-small and with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    home, folder = Path(toy.path("lm-small")), tmp_path_factory.mktemp("little") / "model"
    shutil.copytree(home, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(home)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 160, 2
    config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def small(given: dict, little: str) -> dict:
    """The same recipe for a second: few rows, few steps, short answers, a small model."""
    small_model = "toy:lm-small" if ANSWERS & given.keys() else little
    text = re.sub(r"toy:lm(?![\w-])", small_model, yaml.safe_dump(given))
    for key, few in {"max_new_tokens": 8, "max_steps": 2}.items():
        text = re.sub(rf"\b{key}: \d+", f"{key}: {few}", text)
    given = yaml.safe_load(text)
    given.setdefault("model", small_model)
    given |= {
        "max_steps": 2,
        "per_device_train_batch_size": min(4, given.get("per_device_train_batch_size", 4)),
        "save_steps": 100,
    }
    plan = given.get("plan")
    if isinstance(plan, dict):
        settings = {f.name for f in fields(find("plan", plan["name"]))}
        few = {"max_new_tokens": 8, "points": 3, "judged": 8}
        plan |= {key: value for key, value in few.items() if key in settings}
        for key in {"sizes", "objectives"} & plan.keys():  # what a study compares
            plan[key] = plan[key][:2]
        if "tax" in settings:  # the rows that are read before and after each run
            given["evaluate"] = [{"name": "forgetting", "n": 8}, *given.get("evaluate", ["loss"])]
    for some in (given, *(plan["of"] if isinstance(plan, dict) and "of" in plan else ())):
        for key in {"data", "eval_data"} & some.keys():
            if isinstance(some[key], dict):
                some[key]["n"] = 12
    if isinstance(given.get("plan"), list):
        given["plan"] = [{**act, **({"max_steps": 2} if "max_steps" in act else {})} for act in given["plan"]]
    if given.get("evaluate"):
        given["evaluate"] = [
            {**e, "n": 8} if isinstance(e, dict) and "n" in e else e for e in given["evaluate"]
        ]
    return {
        **given,
        "evaluate": (
            ["loss"] if "evaluate" not in given or given["evaluate"][0] == "loss" else given["evaluate"]
        ),
    }


@pytest.mark.parametrize("path", [case(path) for path in RECIPES])
def test_a_recipe_runs(path, little, tmp_path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) <= 12 and path.read_text(encoding="utf-8").startswith("# "), (
        "a comment that says what it is, and 12 lines at most"
    )
    assert load_data(Recipe.load(path)).rows
    given.pop("output_dir", None)
    report = luthier.tune(small(given, little), folder=tmp_path / "run")
    assert report.after and all(v == v for v in report.after.values())
    assert (Path(report.folder) / "report.html").is_file()
