"""Going on with other micro-batches, or on another number of processes: where that changes nothing but
memory it is allowed, else it is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from luthier.errors import RecipeError
from luthier.model.policy import Roles
from luthier.run.folder import update_state
from luthier.run.session import Session
from luthier.storage.layout import read_state

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def check_batches(session: Session, roles: Roles, checkpoint: Path | None) -> None:
    """How a step's rows are divided, into run.json; of a run that goes on, whether another division gives the
    same steps. Raises RecipeError.
    """
    if not session.main:
        return
    recipe = session.recipe
    here = {
        "per_device_train_batch_size": recipe.per_device_train_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "processes": session.accelerator.num_processes,
    }
    there = read_state(session.folder).get("batches")
    if there == here:
        return
    if checkpoint is not None and isinstance(there, dict) and there.keys() == here.keys():
        was, now = _words(there), _words(here)
        if reason := _why_another_run(session, roles, there, here):
            raise RecipeError(
                f"{session.folder} was begun with {was} and cannot go on with {now}: {reason}; use the"
                " former numbers",
                "another_run",
            )
        session.warn(f"going on with {now} instead of {was}: the rows of a step are the same")
    update_state(session.folder, batches=here)


def _words(batches: dict[str, int]) -> str:
    rows, accumulation, processes = batches.values()
    return f"{rows} rows x {accumulation} micro-batches x {processes} processes"


def _why_another_run(
    session: Session, roles: Roles, there: dict[str, int], here: dict[str, int]
) -> str | None:
    """Why steps would not be the same; None where they are, up to the order of sums."""
    (rows, accumulation, processes), former = here.values(), there.values()
    size, former_size = rows * accumulation * processes, _product(former)
    if size != former_size:
        return f"a step would read {size} rows instead of {former_size}"
    if processes != there["processes"] and session.methods.online_stages:
        return "online stages draw by process"
    for method in _methods(session):
        for test in ("accumulation", "processes"):
            if reason := getattr(method, "contract", {}).get(test):
                return f"{method.name}: {reason}"
    if _draws_noise(session, roles):
        return "dropout and noise are drawn for each micro-batch"
    return None


def _product(numbers: Any) -> int:
    product = 1
    for number in numbers:
        product *= int(number)
    return product


def _methods(session: Session) -> list[Any]:
    """Whatever could make a step depend on how its rows are divided."""
    methods = session.methods
    terms = [] if methods.objective is None else [term for _, term in methods.objective.terms()]
    return [*terms, methods.tuner, methods.estimator, *methods.chain]


def _draws_noise(session: Session, roles: Roles) -> bool:
    """Whether training draws random numbers while the network reads."""
    model = roles.policy.model
    if getattr(session.methods.architecture, "neftune_noise_alpha", 0):
        return True
    for module in model.modules():
        if isinstance(module, DROPOUT) and module.p > 0:
            return True
    for name, value in model.config.get_text_config().to_dict().items():
        if "drop" in name and isinstance(value, float) and value > 0:
            return True
    return False
