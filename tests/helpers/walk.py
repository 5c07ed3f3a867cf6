"""Two steps of every objective and of every tuner, on one process or on several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from helpers import tuners
from helpers.objectives import batch_of, cast, contract_rows, network
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.model.batch import collate
from luthier.model.policy import Policy, Roles
from luthier.processes.group import ALONE, Processes
from luthier.registry import build, card, find, names
from luthier.train.optimizer import Chain
from luthier.train.trainer import BatchSchedule, Trainer

STEPS, ROWS = 2, 4  # rows of a step
# what asks another kind of network (classifiers, reward models) or of estimator
ELSEWHERE = {"values", "forward_only"}
CASES = [
    *(("objective", name) for name in names("objective") if not ELSEWHERE & card("objective", name).requires),
    *(("tuner", name) for name in names("tuner")),
]


class Outcome(NamedTuple):
    """What a run came to, or why it was refused."""

    losses: list[float]
    tensors: dict[str, torch.Tensor]
    refusal: str = ""
    trained: tuple[str, ...] = ()  # names of the tensors that move


def outcome(kind: str, name: str, micro: int, processes: Processes = ALONE) -> Outcome:
    """Of two steps in micro-batches of so many rows."""
    try:
        roles, rows, objective = {"objective": _objective, "tuner": _tuner}[kind](name)
    except RecipeError as error:
        return Outcome([], {}, str(error))
    clock = roles.clock
    clock.total = STEPS
    for module in roles.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    chain = Chain([build("transform", "momentum")], roles.tuner, clock, 0.002)
    batches = BatchSchedule(ROWS, micro)
    losses: list[float] = []
    trainer = Trainer(roles, rows, objective, chain, build("estimator", "backprop"), batches, processes)
    trainer.hooks = [lambda trainer, log: losses.append(log["loss"])]
    trainer.run()
    return Outcome(losses, roles.tuner.tensors(), trained=tuple(roles.tuner.parameters()))


def outcomes(cases: list[tuple[str, str]], micro: int, processes: Processes = ALONE) -> list[Outcome]:
    return [outcome(kind, name, micro, processes) for kind, name in cases]


def _objective(name: str) -> tuple[Roles, list[dict], Any]:
    objective = build("objective", name)
    torch.manual_seed(3)
    net = network()
    attached = build("tuner", "full").attach(net)
    others = cast()
    roles = Roles(Policy(Causal(), net, attached), Clock(), others.renderer, **others.players)
    roles.batch = lambda rows, training=False, clock=None: batch_of(rows)
    return roles, contract_rows(objective, 8), objective


def _tuner(name: str) -> tuple[Roles, list[dict], Any]:
    attached, _ = tuners.anywhere(name)
    rows = []
    for i in range(8):
        rng = torch.Generator().manual_seed(i)
        rows.append({"id": str(i), "ids": torch.randint(3, 97, (7 + i % 3,), generator=rng).tolist()})
    architecture = tuners.architecture_of(attached.model)
    encode = _encode if isinstance(architecture, Causal) else _labelled
    roles = Roles(Policy(architecture, attached.model, attached), Clock(), None)
    roles.batch = lambda rows, training=False, clock=None: collate(rows, encode)
    return roles, rows, build("objective", "sft")


def _labelled(row: dict) -> SimpleNamespace:
    return tuners.labelled({"ids": row["ids"], "id": int(row["id"])})


def _encode(row: dict) -> SimpleNamespace:
    ids = row["ids"]
    return SimpleNamespace(prompt=ids[:3], completions=[ids[3:]], supervised=[[True] * (len(ids) - 3)])


def declared(kind: str, name: str) -> str:
    """Why a method need not be the same with other micro-batches; empty where it must."""
    return find(kind, name).contract.get("accumulation", "")
