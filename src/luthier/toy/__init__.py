"""Toy tasks and models: generated tasks with exact verifiers and small models pretrained on them, so that
everything can be tried offline.

`path("lm")` is the folder of a shipped model (in recipes `toy:lm`), `rows("people", "train", 100)` are rows
of a task (`toy:people/train`), `verify(row, answer)` scores an answer, and `recipe("toy:people")` is what
`luthier tune toy:people` runs. All texts are generated here; the models can be made again by `python -m
luthier.toy.make`.
"""

from pathlib import Path

from .tasks import find, rows
from .tasks import names as worlds

__all__ = ["models", "path", "recipe", "rows", "verify", "worlds"]

_MODELS = Path(__file__).parent / "models"


def models() -> list[str]:
    """The names of the shipped models."""
    return sorted(folder.parent.name for folder in _MODELS.glob("*/config.json"))


def path(name: str) -> Path:
    """The folder of a shipped model; an unknown name is answered by the known ones."""
    if name not in models():
        raise ValueError(f"no toy model {name!r}; there are {', '.join(models()) or 'none'}")
    return _MODELS / name


def verify(row: dict, answer: str) -> float | dict[str, float]:
    """How right an answer to a row of a world is: from 0.0 to 1.0, or several such scores by name (world
    style).
    """
    return find(row["world"]).verify(row, answer)


def recipe(word: str) -> dict:
    """The recipe that "toy:TASK" or "toy:TASK/SPLIT" stands for; it takes a minute or two on two
    cores.

    Without a split: what the world has for tuning, "new" where there is such a split. The rows held out are
    those of the split's test. Raises ValueError for a world or split that is not there.
    """
    world, _, split = word.removeprefix("toy:").partition("/")
    if world in models() and world not in worlds():
        raise ValueError(f"{world} is a model, not a task: `model=toy:{world}` tunes it, on `data=toy:TASK`")
    splits = find(world).SPLITS
    split = split or next(name for name in ("new", "task_1", "train") if name in splits)
    first = rows(world, split, 1)[0]
    objective = "dpo" if first.keys() & {"chosen", "scores"} else "kto" if "label" in first else "sft"
    test = next((name for name in (f"{split}_test", _TESTS.get(split, "")) if name in splits), "")
    data = {
        "data": {"path": f"toy:{world}/{split}", "n": 4000 if objective == "sft" else 1600},
        "objective": objective,
        "learning_rate": 1e-2 if objective == "sft" else 1e-3,
        "per_device_train_batch_size": 32,
    }
    return {**data, "eval_data": {"path": f"toy:{world}/{test}", "n": 200}} if test else data


# where it is not called SPLIT_test
_TESTS = {"train": "test", "static_noise": "new_test", "dynamic_noise": "new_test"}
