"""How the rows of a step are divided into micro-batches and over processes. Rows of a step belong to the run:
one that goes on keeps them, with other micro-batches or on another number of processes, where that changes
nothing but memory and time; else it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from luthier.errors import RecipeError
from luthier.model.policy import Roles
from luthier.run.folder import update_state
from luthier.run.session import Session
from luthier.storage.layout import read_state

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
NOISE = "dropout and noise are drawn for each micro-batch"


@dataclass(frozen=True)
class Batches:
    """How a step's rows are divided."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    processes: int
    per_step: int  # rows of a step, over all micro-batches and processes

    def __str__(self) -> str:
        many = "1 process" if self.processes == 1 else f"{self.processes} processes"
        rows = self.per_device_train_batch_size
        return f"{many} and micro-batches of {rows} rows"


def check_batches(session: Session, roles: Roles, checkpoint: Path | None) -> Batches:
    """How a step's rows are divided, also in run.json; of a run that goes on, whether another division gives
    the same steps. Raises RecipeError.
    """
    recipe, count = session.recipe, session.processes.count
    size, steps = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    here = Batches(size, steps, count, size * steps * count)
    there = None
    if checkpoint is not None and session.main:
        there = _read(session.folder)
    there = session.processes.broadcast(there)
    if there is not None:
        # the recipe's own product is in its fingerprint: a step's rows differ by processes alone
        here = Batches(size, steps, count, there.per_step)
        if here != there:
            _go_on(session, roles, there, here)
    if session.main:
        update_state(session.folder, batches=asdict(here))
    _warn_of_processes(session, roles, here)
    return here


def _read(folder: Path) -> Batches | None:
    """How a run's steps were divided; None where its run.json does not say so."""
    numbers = read_state(folder).get("batches")
    if not isinstance(numbers, Mapping):
        return None
    values = []
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "processes"):
        if not isinstance(numbers.get(name), int):
            return None
        values.append(numbers[name])
    size, steps, count = values
    return Batches(size, steps, count, int(numbers.get("per_step", size * steps * count)))


def _go_on(session: Session, roles: Roles, there: Batches, here: Batches) -> None:
    """Raises RecipeError where the steps would not be the same, up to the order of sums."""
    if reason := _why_another_run(session, roles, there, here):
        raise RecipeError(
            f"{session.folder} was begun with {there} and cannot go on with {here}: {reason}; use the former"
            " numbers",
            "another_run",
        )
    session.warn(
        f"going on with {here} instead of {there}: the rows of a step are the same ({there.per_step:,} rows)"
    )


def _why_another_run(session: Session, roles: Roles, there: Batches, here: Batches) -> str | None:
    """Why steps would not be the same; None where they are."""
    if here.processes != there.processes:
        for name, reason in exceptions(session, "processes"):
            return f"{name}: {reason}"
    # micro-batches are dealt out to processes whole: with the same ones nothing else can differ
    if here.per_device_train_batch_size == there.per_device_train_batch_size:
        return None
    for name, reason in exceptions(session, "accumulation"):
        return f"{name}: {reason}"
    if _draws_noise(session, roles):
        return NOISE
    return None


def exceptions(session: Session, contract: str) -> Iterator[tuple[str, str]]:
    """(name, reason) of the recipe's methods that do not keep a contract: `accumulation` (the size of
    micro-batches changes nothing) or `processes` (their number changes nothing).
    """
    methods = session.methods
    terms = []
    if methods.objective is not None:
        terms = [term for _, term in methods.objective.terms()]
    for method in (*terms, methods.tuner, methods.estimator, *methods.chain, *methods.online_stages):
        if reason := getattr(method, "contract", {}).get(contract):
            yield method.name, reason


def _warn_of_processes(session: Session, roles: Roles, here: Batches) -> None:
    """At the start of a run on several processes: what a step reads, and what does not only depend on it."""
    if here.processes == 1:
        return
    session.warn(f"{here}: {here.per_step:,} rows a step")
    reasons = [f"{name}: {reason}" for name, reason in exceptions(session, "accumulation")]
    if _draws_noise(session, roles):
        reasons.append(NOISE)
    size = here.per_device_train_batch_size
    if reasons and here.per_step > size:
        session.warn(
            f"{'; '.join(reasons)}. So results are those of micro-batches of {size} rows on any number of"
            f" processes, and not those of one micro-batch of {here.per_step:,} rows"
        )
    for name, reason in exceptions(session, "processes"):
        session.warn(f"{name}: {reason}; results are not those of one process")


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
