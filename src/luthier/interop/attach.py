"""A tuner on somebody's own model, for somebody's own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from luthier import compat
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.interop.callback import TunerCallback
from luthier.interop.steps import Steps
from luthier.methods.tuners._base import TunedModel
from luthier.model.batch import Batch, collate
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.text.encoded import Encoded

if TYPE_CHECKING:
    from luthier.model.network import Network

TUNED = "luthier_tuned"  # attribute of a module: its tuned model
STEPS = "luthier_steps"  # and its Steps, where the tuner has steps
MAX_ROWS = 1024  # that a tuner may start from
IGNORED = -100  # the label of a token that is not supervised


def attach(
    model: Network,
    tuner: str | Mapping[str, Any] = "lora",
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Put a tuner on a transformers model, in place.

    Args:
        model: a model of transformers, loaded by its own `from_pretrained`.
        tuner: its name, with its settings as further arguments, or a mapping as in recipes.
        rows: for tuners that start from data: mappings with `input_ids` and, optionally, `labels` (-100 where
            a token is not supervised), as a trainer's data set has them.
        seed: of whatever the tuner draws.

    Returns:
        What to hand to the trainer or loop: a PeftModel, whose `save_pretrained` writes the adapter, or the
        model itself where the tuner trains the model's own weights.

    Raises:
        RecipeError: the tuner does not fit the model, lacks rows, or only luthier's own loop can train it.
    """
    if hasattr(model, TUNED):
        raise RecipeError(f"the model has tuner '{getattr(model, TUNED).settings.name}' already")
    if isinstance(tuner, str):
        tuner = {"name": tuner}
    built = build("tuner", {**tuner, **settings})
    with compat.loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = built.attach(model)
        reason = tuned.why_not_elsewhere()
        if reason is not None:
            raise RecipeError(f"tuner '{built.name}' works in luthier.tune only: {reason}")
        _start(tuned, rows, seed)
        module = tuned.module()
        compat.hold(model)
    steps = None
    if tuned.has_steps():
        steps = Steps(tuned, module, seed)
    for each in (model, module):
        setattr(each, TUNED, tuned)
        setattr(each, STEPS, steps)
    return module


def callbacks(model: nn.Module) -> list[TunerCallback]:
    """What a trainer needs for the tuner on this model: `Trainer(..., callbacks=luthier.callbacks(model))`.
    Empty where the tuner does nothing between steps.
    """
    steps = _steps_of(model)
    if steps is None:
        return []
    return [TunerCallback(steps)]


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, step: int = 0) -> None:
    """Before a loop of one's own: have the tuner follow the steps of an optimizer.

    Args:
        model: what `attach` returned.
        optimizer: made after `attach`, from all parameters that require a gradient.
        total_steps: optimizer steps of the whole run.
        step: those that are behind it, in a run that goes on.
    """
    steps = _steps_of(model)
    if steps is not None:
        steps.follow(optimizer, total_steps, step)


def _steps_of(model: nn.Module) -> Steps | None:
    model = getattr(model, "module", model)  # of torch's DistributedDataParallel
    if not hasattr(model, TUNED):
        raise RecipeError("no tuner of luthier is on this model: use what luthier.attach returned")
    return getattr(model, STEPS)


# ------------------------------------------------------------------------------------- starts from rows


class _NoRows:
    """Stands for rows that were not given; a tuner that looks at them is refused."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, place: Any) -> Any:
        raise RecipeError(
            f"tuner '{self.name}' starts from rows: luthier.attach(model, ..., rows=[{{'input_ids': [...],"
            " 'labels': [...]}, ...])"
        )


class _TokenRoles(Roles):
    """Roles of a causal model whose rows are tokens already."""

    def batch(self, rows: Sequence[dict], training: bool = False) -> Batch:
        return collate(rows, _encoded).to(self.device)


def _start(tuned: TunedModel, rows: Sequence[Mapping[str, Any]] | None, seed: int) -> None:
    """What a run does before its first step."""
    policy = Policy(build("architecture", "causal"), tuned.model, tuned)
    roles = _TokenRoles(policy, Clock(seed), SimpleNamespace())  # pyright: ignore[reportArgumentType]
    first: Any = _NoRows(tuned.settings.name)
    if rows is not None:
        first = [{**rows[i], "id": str(i)} for i in range(min(len(rows), MAX_ROWS))]
        for row in first:
            if "input_ids" not in row:
                raise RecipeError(
                    f"rows[{row['id']}] has no input_ids: tuners start from tokenized rows here"
                )
    for component in tuned.components:
        component.initialize(first, roles)
    for component in tuned.components:
        component.ready(first, roles)


def _encoded(row: Mapping[str, Any]) -> Encoded:
    """A row of a trainer's data set as prompt and completion."""
    ids = [int(token) for token in row["input_ids"]]
    labels = [int(label) for label in row.get("labels", ids)]
    start = 1
    while start < len(ids) and labels[start] == IGNORED:
        start += 1
    supervised = [label != IGNORED for label in labels[start:]]
    return Encoded(ids[:start], [ids[start:]], [supervised])
