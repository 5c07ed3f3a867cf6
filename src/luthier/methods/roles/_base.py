"""Who an objective may ask besides the policy. A role may bring parts of its own (a critic's head, a memory)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from luthier.registry import Capability, family

REFERENCE = Capability(
    "reference", says="a reference model", advice="name one under roles, e.g. `roles: {reference: initial}`"
)
TEACHER = Capability(
    "teacher",
    says="a teacher model",
    advice="name one under roles, e.g. `roles: {teacher: {name: model, model: FOLDER}}`",
)


@family
class Role:
    """Family: `play` answers with whatever `roles.<name>` shall be."""

    constant: ClassVar[bool] = False  # does it say the same of a row at every step of a run?
    per_run: ClassVar[bool] = False  # does what it says depend on what the run began with?

    def parts(self, policy: Any) -> dict[str, Part]:
        """Parts that this role brings, by name. policy: before anything is brought."""
        return {}

    def reads(self, name: str, tokenizer: Any) -> None:
        """Raises RecipeError, before anything is loaded, where this role cannot read what the policy's
        tokenizer writes.
        """

    def play(self, name: str, policy: Any) -> Any:
        """policy: the training policy. Usually returns a Policy."""
        raise NotImplementedError


class Part(nn.Module):
    """What a role brings: parameters are trained along with the tuner, buffers are kept in checkpoints."""

    def ready(self, rows: list[dict], roles: Any) -> None:
        """Once, before the first step."""

    def after_step(self, clock: Any) -> None:
        """After the update of a step, in which losses may have been asked more than once."""


def brought(policy: Any, role: str, part: str) -> Any:
    """A part that a role has brought, by its name."""
    from luthier.model.load import BROUGHT

    return policy.attached.parts[f"{BROUGHT}{role}.{part}"]


def own(policy: Any) -> Any:
    """The tuner alone, without what roles brought."""
    return getattr(policy.attached, "attached", policy.attached)


def width_of(policy: Any) -> int:
    """Of the hidden states that a network answers from."""
    head = policy.model.get_output_embeddings()
    return policy.model.config.num_labels if head is None else head.weight.shape[1]


def everyone(mine: list) -> list:
    """What each process says, one after the other: the same list in all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine
    heard: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(heard, mine)
    return [x for each in heard for x in each]
