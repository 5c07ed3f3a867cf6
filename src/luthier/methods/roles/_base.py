"""The kind's protocol: models beside the policy that an objective can query. A role may bring trainable parts
(a head, a memory).

A role that provides a capability (`memory`) is played under that name and under no other; all others are
played under whatever name a method requires.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from luthier.methods.tuners._base import Component, ParamGroup
from luthier.processes import group
from luthier.registry import Capability, family

REFERENCE = Capability(
    "reference",
    says="a reference model",
    advice="set it under roles, e.g. `roles: {reference: initial}`",
    costs="a forward pass of the reference over the same rows, without gradient. With a tuner that"
    " can be disabled the reference is the base model itself and takes no memory; stage"
    " `cache_logprobs` stores its log-probabilities beforehand.",
)
SAMPLER = Capability(
    "sampler",
    says="a model that generates the samples instead of the policy",
    advice="e.g. `roles: {sampler: {name: vllm, base_url: http://localhost:8000/v1, model: MODEL}}`",
)
REFERENCE_OUTPUTS = Capability(
    "reference_outputs",
    says="a reference that is a network, with whole distributions and hidden states",
    advice="e.g. `roles: {reference: initial}`",
)
TEACHER = Capability(
    "teacher",
    says="a teacher model",
    advice="set it under roles, e.g. `roles: {teacher: {name: model, model: FOLDER}}`",
    costs="the teacher in memory, unless it is the policy's own base or average, and its forward pass over"
    " the same rows, without gradient.",
)
CRITIC = Capability(
    "critic",
    says="a critic, which says what a state is expected to earn",
    advice="use `roles: {critic: value_head}`",
)

PREFIX = "role:"  # what the names of tensors begin with that a role brought


@family
class Role:
    """Family: `play` returns the model for `roles.<name>`."""

    # what it can be asked: all that a network says of a batch, log-probabilities of its tokens alone, or text
    answers: ClassVar[Literal["outputs", "logprobs", "text"]] = "outputs"
    constant: ClassVar[bool] = False  # does it say the same of a row at every step of a run?
    per_run: ClassVar[bool] = False  # does what it says depend on what the run began with?
    starts_from_rows: ClassVar[bool] = False  # does it read training rows before the first step?

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


class Part(nn.Module, Component):
    """A component that a role brings: its parameters are trained along with the tuner, its buffers are in
    checkpoints.

    The hooks of components apply to it. It is not part of the saved adapter.
    """

    name = ""  # of its tensors in checkpoints: role:ROLE.PART

    def all_param_groups(self) -> list[ParamGroup]:
        named = dict(self.named_parameters())
        return [ParamGroup(self.name, named)] if named else []

    def memory(self) -> dict[str, Tensor]:
        return {f"{self.name}.{key}": buffer for key, buffer in self.named_buffers()}


def bring(tuned: Any, role: str, parts: dict[str, Part]) -> None:
    """Let the parts of a role train along with a tuned model."""
    for key, part in parts.items():
        part.role, part.name = role, f"{PREFIX}{role}.{key}"
        tuned.others.append(part)


def brought(policy: Any, role: str, part: str) -> Any:
    """A part that a role has brought, by its name."""
    name = f"{PREFIX}{role}.{part}"
    return next(c for c in policy.attached.components if c.role == role and c.name == name)


def width_of(policy: Any) -> int:
    """Of the hidden states that a network answers from."""
    head = policy.model.get_output_embeddings()
    return policy.model.config.num_labels if head is None else head.weight.shape[1]


def everyone(mine: list) -> list:
    """What each process says, one after the other: the same list in all of them."""
    return [x for part in group.current().gather(mine) for x in part]
