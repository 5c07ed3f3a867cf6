"""Toy tasks and models: generated tasks with exact verifiers and small models pretrained on them, so that
everything can be tried offline.

`path("lm")` is the folder of a shipped model (in recipes `toy:lm`), `rows("people", "train", 100)` are rows
of a task (`toy:people/train`), `verify(row, answer)` scores an answer, and `recipe("toy:people")` is what
`luthier tune toy:people` runs. All texts are generated here; the models can be made again by `python -m
luthier.toy.make`.
"""

from pathlib import Path

from luthier.storage.toy import current_row

from .tasks import find, rows
from .tasks import names as task_names

__all__ = ["models", "path", "recipe", "rows", "task_names", "verify"]

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
    """The score of an answer to a row of a toy task: from 0.0 to 1.0, or several such scores by name (task
    style).
    """
    row = current_row(row)
    return find(row["task"]).verify(row, answer)


def recipe(word: str) -> dict:
    """The recipe that "toy:TASK" or "toy:TASK/SPLIT" stands for; it takes a minute or two on two
    cores.

    Without a split: what the task has for tuning, "new" where there is such a split. The rows held out are
    those of the split's test. Raises ValueError for a task or split that is not there.
    """
    task, _, split = word.removeprefix("toy:").partition("/")
    if task in models() and task not in task_names():
        raise ValueError(f"{task} is a model, not a task: `model=toy:{task}` tunes it, on `data=toy:TASK`")
    splits = find(task).SPLITS
    split = split or next(name for name in ("new", "task_1", "train") if name in splits)
    first = rows(task, split, 1)[0]
    objective = "dpo" if first.keys() & {"chosen", "scores"} else "kto" if "label" in first else "sft"
    test = next((name for name in (f"{split}_test", _TESTS.get(split, "")) if name in splits), "")
    data = {
        "data": {"path": f"toy:{task}/{split}", "n": 4000 if objective == "sft" else 1600},
        "objective": objective,
        "learning_rate": 1e-2 if objective == "sft" else 1e-3,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 32,
    }
    return {**data, "eval_data": {"path": f"toy:{task}/{test}", "n": 200}} if test else data


# where it is not called SPLIT_test
_TESTS = {"train": "test", "static_noise": "new_test", "dynamic_noise": "new_test"}
