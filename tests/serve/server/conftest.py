"""Two LoRA runs on one base and a run whose tuner changes more, served once for all tests."""

from __future__ import annotations

import pytest

import luthier
from helpers.rows import recipe_of

ROWS = []
for i in range(12):
    turns = [{"role": "user", "content": f"{i}+1="}, {"role": "assistant", "content": f"It is {i + 1}."}]
    ROWS.append({"messages": turns})
TUNERS = {
    "low": {"name": "lora", "r": 4},
    "lower": {"name": "lora", "r": 2, "target_modules": ["q_proj", "down_proj"]},
    "scaled": "ssf",
}


@pytest.fixture(scope="session")
def runs(shallow, tmp_path_factory) -> dict[str, str]:
    """Name -> folder of a run."""
    home = tmp_path_factory.mktemp("served")
    folders = {}
    for seed, (name, tuner) in enumerate(TUNERS.items()):
        changes = {"tuner": tuner, "data": ROWS, "seed": seed, "max_steps": 2, "learning_rate": 0.05}
        luthier.tune({**recipe_of(shallow), **changes}, folder=home / name)
        folders[name] = str(home / name)
    return folders


@pytest.fixture(scope="session")
def served(runs):
    from luthier.serve.server.models import load_served

    return load_served(list(runs.values()))
