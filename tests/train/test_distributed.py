"""distributed: two processes are one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

import luthier
from helpers.rows import PAIRS, SUMS, recipe_of
from helpers.runs import ROLLOUT, near, weights


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


SHARED = {  # what two processes are asked to do together, and how near they must come to what one does alone
    "sft": ({"tuner": "full", "eval_steps": 1, "evaluate": ["loss", "generate", "forgetting"]}, 1e-5),
    "dpo": ({"tuner": "lora", "objective": "dpo", "data": PAIRS}, 1e-5),
    "grpo": ({"tuner": "lora", "objective": "grpo", "num_iterations": 2, "live": ROLLOUT}, 1e-4),
    "mezo": ({"tuner": "lora", "estimator": "mezo", "learning_rate": 1e-3}, 1e-3),
    "last row alone": ({"tuner": "full", "data": SUMS[:9], "max_steps": None, "num_train_epochs": 1}, 1e-5),
    "rollout of nothing": (
        {"tuner": "lora", "objective": "grpo", "live": ROLLOUT, "data": SUMS[:9], "max_steps": None},
        1e-4,
    ),
    "stages": ({"tuner": "lora", "stages": [{"name": "ifd", "share": 0.9}]}, 1e-5),
}


@pytest.fixture(scope="module")
def together(tiny, tmp_path_factory):
    """The folder in which two gloo processes of 2 rows have run every recipe of SHARED, each twice: started
    once, since starting is slow.
    """
    folder = tmp_path_factory.mktemp("two")
    recipes = {name: recipe_for(tiny, name) | {"per_device_train_batch_size": 2} for name in SHARED}
    (folder / "recipes.json").write_text(json.dumps(recipes))
    (folder / "two.py").write_text(
        textwrap.dedent("""
        import json, torch
        torch.set_num_threads(1)
        import luthier
        for name, recipe in json.load(open("recipes.json")).items():
            a, b = (luthier.tune(recipe, folder=name) for _ in range(2))
            assert a.after == b.after and a.losses == b.losses
    """)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [sys.executable, "two.py"]
    both = [
        subprocess.Popen(command, cwd=folder, env=env | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE)
        for r in "01"
    ]
    errors = [p.communicate(timeout=300)[1].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    return folder


def recipe_for(tiny, name) -> dict:
    return recipe_of(tiny) | {
        "optim": {"name": "sgd", "max_grad_norm": 0},
        "learning_rate": 0.05,
        "max_steps": 4,
        **SHARED[name][0],
    }


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_are_one(tiny, together, tmp_path, name):
    """Two gloo processes of 2 rows = one process of 4 rows; a finished run answers in both."""
    atol = SHARED[name][1]
    one, two = (
        luthier.tune(recipe_for(tiny, name), folder=tmp_path / "one"),
        luthier.Report.read(together / name),
    )
    assert two.losses == pytest.approx(one.losses, abs=atol) and two.before == pytest.approx(
        one.before, abs=1e-5
    )
    assert near(weights(tmp_path / "one"), weights(together / name), atol)
