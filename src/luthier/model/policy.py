"""Roles: the policy that trains, and the other networks that an objective or a stage reads (reference,
teacher, ...).

One network can have many roles: the reference of a LoRA run is the policy with its adapter switched off. What
fills the other roles are methods of the kind `role`, named in the recipe, e.g. `roles: {reference: initial,
teacher: {name: model, ...}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures._base import Architecture
from luthier.model.batch import Batch, collate
from luthier.model.outputs import LAYERS, Outputs

if TYPE_CHECKING:
    from luthier.methods.tuners._base import TunedModel
    from luthier.model.network import Network
    from luthier.text.encode import Renderer


class Policy(nn.Module):
    """A network in a role. `context` puts it there; the training policy has none."""

    def __init__(
        self,
        architecture: Architecture,
        model: Network,
        attached: TunedModel,
        role: str = "policy",
        context: Callable[[], AbstractContextManager] | None = None,
    ):
        super().__init__()
        self.architecture, self.model, self.attached = architecture, model, attached
        self.role, self.context = role, context
        # told how much of a long evaluation is done: (done, of, what)
        self.progress: Callable[[int, int, str], None] = lambda done, of, what: None

    def train(self, mode: bool = True) -> Policy:
        """As torch has it. Looking takes a third of the time of setting, and a step begins with it."""
        if all(m.training == mode for m in self.modules()):
            return self
        return super().train(mode)

    def outputs(self, batch: Batch) -> Outputs:
        """This role's outputs for a batch: read once, however many objectives use them."""
        if self.role not in batch.read:
            batch.read[self.role] = self(batch)
        return batch.read[self.role]

    def logprobs(self, batch: Batch) -> Tensor:
        """[T] log-probability of each supervised token."""
        return self.outputs(batch).logprobs

    def layers(self, batch: Batch) -> list[Tensor]:
        """[T, d] for each block, lowest first: the state behind it at the places that predict the supervised
        tokens. Called before `outputs` of the same batch, it costs no forward of its own.
        """
        if self.role not in batch.read or batch.read[self.role].layers is None:
            token = LAYERS.set(True)
            try:
                batch.read[self.role] = self(batch)
            finally:
                LAYERS.reset(token)
        if batch.read[self.role].layers is None:
            raise RecipeError(
                "this architecture gives no hidden states of single layers; use a causal"
                " language model or masked_lm"
            )
        return batch.read[self.role].layers

    def forward(self, batch: Batch) -> Outputs:
        """Read a batch, however often it was read before; see `outputs`."""
        with self.role_context():
            outputs = self.architecture.forward(self.model, self.attached, batch)
        outputs.role_context = self.role_context  # the head is applied later, and in the same role
        return outputs

    @contextmanager
    def role_context(self) -> Iterator[None]:
        """The one place where the network becomes this role: its context, no dropout, no gradient."""
        if self.context is None:
            yield
            return
        with self.context(), eval_mode(self.model), torch.no_grad():
            yield

    def eval_mode(self) -> AbstractContextManager:
        """Without dropout, for a while."""
        return eval_mode(self.model)

    def as_role(self, role: str, context: Callable[[], AbstractContextManager] = nullcontext) -> Policy:
        """The same network in another role."""
        return Policy(self.architecture, self.model, self.attached, role, context)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[list[int]]]:
        """n completions of each prompt as token ids (seeds, n, max_new_tokens, temperature, top_p, top_k,
        stop, decoder, rows).
        """
        context = self.context or nullcontext
        tokens = [list(prompt) for prompt in prompts]
        most = how.get("max_new_tokens", 0)

        def hear(written: list[list[int]]) -> None:
            self.progress(max(map(len, written)), most, "tokens of each answer")

        how.setdefault("hear", hear)
        if not self.attached.distinguishes_rows():
            how.pop("rows", None)
        with context(), eval_mode(self.model):
            return self.architecture.generate(self.model, self.attached, tokens, **how)


class Roles:
    """What a method may use: `policy`, `tuner`, `clock`, `renderer`, `device` and `warn` always, and in
    `players` what the recipe names under `roles`. `roles.reference` is `roles.players["reference"]`.
    """

    def __init__(self, policy: Policy, clock: Clock, renderer: Renderer, **players: Any):
        self.policy, self.clock, self.renderer = policy, clock, renderer
        self.players: dict[str, Any] = players
        self.device = next(policy.model.parameters()).device
        self.warn: Callable[[str], None] = lambda sentence: None  # shows the user a warning
        self.stage_metrics: dict[str, float] = {}  # what stages measure on the rows before training
        self.dropped: dict[str, str] = {}  # id of a row that a stage drops -> why, until it is written down
        self.folder: Path | None = None  # of the run, where there is one

    @property
    def tuner(self) -> TunedModel:
        """What trains."""
        return self.policy.attached

    def __getattr__(self, role: str) -> Any:
        if role.startswith("__"):
            raise AttributeError(role)
        if role in self.__dict__.get("players", ()):
            return self.players[role]
        raise RecipeError(
            f"no model has the role '{role}' in this recipe; set it under roles, e.g. `roles:"
            f" {{{role}: initial}}`"
        )

    def policies(self) -> list[Policy]:
        """Every network in a role, the policy first."""
        policies = [self.policy]
        for player in self.players.values():
            if isinstance(player, Policy):
                policies.append(player)
        return policies

    def batch(self, rows: Sequence[dict], training: bool = False, clock: Clock | None = None) -> Batch:
        """Rows -> tokens on the policy's device. What is drawn to be predicted (gaps) changes from step to
        step in training only. clock: of another step than this one.
        """
        arch = self.policy.architecture
        clock = clock or self.clock
        if not training:
            clock = Clock(clock.seed)
        batch = collate(rows, lambda row: arch.encode(row, self.renderer))
        return arch.ask(batch, self.renderer, clock).to(self.device)

    def text(self, ids: Sequence[int]) -> str:
        return self.renderer.text(ids)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    was = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in was:
            m.training = True
