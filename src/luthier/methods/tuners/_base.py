"""The kind's protocol: which parameters are trained. A tuner attaches to a model; the tuned model lists its
trainable parameters and can be disabled, exchanged, merged and saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.registry import Capability, family
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.clock import Clock
    from luthier.methods.transforms._base import GradientMoments
    from luthier.model.batch import Batch
    from luthier.model.network import Network

DISABLE_ADAPTER = Capability(
    "disable_adapter",
    says="a tuner that can be disabled to give the base model",
    advice="or use `roles: {reference: initial}`, which keeps a copy of the trainable parameters",
)
MERGE = Capability("merge", says="a tuner that can be merged into the weights")
LOW_RANK = Capability("low-rank", says="a low-rank tuner with factors A and B")
LORA = Capability("lora", says="a tuner whose update is LoRA's B A, without DoRA")
FACTOR_B = Capability("factor-b", says="a tuner with a factor B of a low-rank update")


# hooks of a component by which it takes part in the steps of a run
STEP_HOOKS = ("on_phase", "after_phase", "before_step", "extra_grads", "after_step")


@dataclass
class ParamGroup:
    """Tensors that belong together: a weight alone, or the A and B of one layer."""

    name: str
    params: dict[str, nn.Parameter]  # e.g. {"A": ..., "B": ...} or {"weight": ...}
    by: Any = None  # the settings of the tuner that made it (LoRA: r, lora_alpha)


@family
class Tuner:
    """Family: settings that attach to a model."""

    on_quantized: ClassVar[bool] = False  # can it sit on a base whose linear weights are codes?
    changes_phase: ClassVar[bool] = False  # do other tensors train later in a run than at its start?

    def attach(self, model: Network) -> TunedModel:
        """Put the tuner on the model, in place. The tuned model starts as the base model."""
        raise NotImplementedError


class Component:
    """Something that is part of the network while it trains: what a tuner attached, or a part that a role
    brings. It declares its own state, and its hooks are called at fixed points of a run.

    Every hook has a default that does nothing.
    """

    role: str | None = None  # the role that brought it; None: it is the tuner's
    per_row = False  # must `on_rows` hear of which row everything is?
    warnings: tuple[str, ...] = ()  # sentences about what was attached, for the person who started the run

    # --- state

    def all_param_groups(self) -> list[ParamGroup]:
        """What may train, in a fixed order. Names and shapes are fixed until the next phase begins."""
        return []

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Tensors that never train and yet belong to what is saved (factors that were made from data)."""
        return {}

    def memory(self) -> dict[str, Tensor]:
        """Tensors that only training needs (gathered toward the next decision): in checkpoints, not in what
        `save` writes.
        """
        return {}

    def prepare_load(self, tensors: Mapping[str, Tensor]) -> None:
        """Before the state is overwritten with `tensors`: take their form (phase, ranks, places)."""

    def after_load(self) -> None:
        """The state was overwritten: follow it with whatever is derived from it."""

    # --- life of a run

    def initialize(self, rows: list[dict], roles: Any) -> None:
        """Once, before step 0, unless the run goes on from another: start from data."""

    def ready(self, rows: list[dict], roles: Any) -> None:
        """Once, before step 0, whatever the run starts from: what is kept beside the trained tensors."""

    def on_phase(self, clock: Clock) -> dict[str, Tensor]:
        """Before a step: decide what trains from here on (masks that move, layers in turn, a sparse phase
        after a dense one).

        Returns name of a tensor -> mask of its entries that begin anew: the optimizer forgets their moments.
        """
        return {}

    def after_phase(self, resets: Mapping[str, Tensor]) -> None:
        """All have decided: whoever follows the trained tensors (a running average) begins anew where
        `resets` says so, and where names or shapes are others than before.
        """

    def before_step(self, clock: Clock) -> None:
        """Whatever else is due before the losses of a step."""

    def on_rows(self, batch: Batch, rows: Tensor) -> None:
        """Before the network reads: of which row of the batch each row [R], or place [R, W], of its tensors
        is. It holds until the next call, since backward may read again.
        """

    def on_prompts(self, prompts: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> None:
        """Before these B prompts are read to be continued: of which row each is, where that is known (rows
        may be empty). It holds until `on_selected`.
        """

    def on_selected(self, index: Tensor) -> None:
        """What is generated goes on with these of the sequences [B'], each perhaps several times."""

    def gradient_moments(self) -> dict[str, GradientMoments]:
        """Name of a tensor -> what is known of the gradients of the entries that `on_phase` has just named,
        for optimizers whose state can begin there.
        """
        return {}

    def entry_places(self, group: str, slot: str) -> tuple[Tensor, tuple[int, int]] | None:
        """Where the numbers of a parameter are entries of a matrix: their flat places in it, and its shape
        [out, in].
        """
        return None

    def extra_grads(self, group: str) -> dict[str, Tensor]:
        """slot -> the gradient of a term of its own beside the loss (a penalty), when a group is stepped."""
        return {}

    def after_step(self, clock: Clock) -> None:
        """After the update, gradients still there."""


class TunedModel(Component):
    """A tuner on a model, and the other components of a run. Subclasses define `all_param_groups`; most also
    `off` and `merged`.

    `components` are this object first, then its inner components, then parts that roles bring. A hook
    concerns one component; the run calls the methods below, which collect over all of them.
    """

    virtual = 0  # places the layout keeps free before every sequence (soft prompts)
    changes_inputs = False  # is something added to the embeddings of prompts?
    reads_layers = False  # is something trained on states of layers below those that change?
    # hidden states below all layers that train, cached by a run (train/hidden_cache.py)
    hidden_cache: Any = None

    def __init__(self, settings: Any, model: Network):
        self.settings, self.model = settings, model
        self.others: list[Component] = []  # not this one itself: a circle would keep the model in memory
        self.resets: dict[str, Tensor] = {}  # masks of entries that the optimizer has yet to forget
        self.moments: dict[str, GradientMoments] = {}  # of these entries, where they are known

    @property
    def components(self) -> list[Component]:
        """This one first, then the others."""
        return [self, *self.others]

    # --- what trains, over all components

    def _components(self, parts: bool) -> list[Component]:
        return [c for c in self.components if parts or c.role is None]

    def param_groups(self) -> list[ParamGroup]:
        """The groups that train now."""
        groups = []
        for component in self.components:
            for group in component.all_param_groups():
                if any(p.requires_grad for p in group.params.values()):
                    groups.append(group)
        return groups

    def parameters(self, parts: bool = True) -> dict[str, nn.Parameter]:
        """'group.slot' -> parameter, whether it trains now or not. parts: also what roles brought."""
        named = {}
        for component in self._components(parts):
            for group in component.all_param_groups():
                named |= {f"{group.name}.{slot}": p for slot, p in group.params.items()}
        return named

    def state(self, parts: bool = True) -> dict[str, Tensor]:
        """Everything that a run may change, by name, not copied: what checkpoints hold, averages follow and
        roles exchange. The names are fixed within a phase. parts: also what roles brought.
        """
        named: dict[str, Tensor] = dict(self.parameters(parts))
        for component in self._components(parts):
            named |= component.frozen_tensors() | component.memory()
        return named

    def tensors(self, parts: bool = True) -> dict[str, Tensor]:
        """A copy of the state."""
        return {name: tensor.detach().clone() for name, tensor in self.state(parts).items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors()` back. Raises RecipeError when names or shapes differ."""
        for component in self.components:
            component.prepare_load(tensors)
        state = self.state()
        odd = sorted(state.keys() ^ tensors.keys())
        odd += [k for k in state.keys() & tensors.keys() if state[k].shape != tensors[k].shape]
        if odd:
            raise RecipeError(
                f"the saved tensors do not fit tuner '{self.settings.name}':"
                f" {', '.join(odd[:3])}{' ...' * (len(odd) > 3)}"
            )
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
        for component in self.components:
            component.after_load()

    @contextmanager
    def using(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Older, averaged or another task's tensors for a while; nothing is copied. They must cover the
        tuner's own state; parts that roles brought stay as they are where they are not named.
        """
        state = self.state(parts=False)
        state |= {name: tensor for name, tensor in self.state().items() if name in tensors}
        own = {name: tensor.data for name, tensor in state.items()}
        try:
            for name, tensor in state.items():
                tensor.data = tensors[name].to(tensor.dtype)
            yield
        finally:
            for name, tensor in state.items():
                tensor.data = own[name]

    # --- the steps of a run, over all components

    def begin_step(self, clock: Clock) -> None:
        """Before the losses of a step: what trains in it is decided."""
        resets: dict[str, Tensor] = {}
        for component in self.components:
            resets |= component.on_phase(clock)
        for component in self.components:
            component.after_phase(resets)
        self.resets |= resets
        for component in self.components:
            self.moments |= component.gradient_moments()
        for component in self.components:
            component.before_step(clock)

    def schedule_step(self, clock: Clock) -> int:
        """The step of the run whose learning rate holds now: this one, unless phases begin it anew."""
        return clock.step

    def end_step(self, clock: Clock) -> None:
        """After the update, gradients still there."""
        for component in self.components:
            component.after_step(clock)

    # --- loops that are not luthier's (interop/)

    def module(self) -> nn.Module:
        """What another loop trains, saves and resumes: the network itself, or a wrapper around it."""
        return self.model

    def why_not_elsewhere(self) -> str | None:
        """Why only luthier's own loop can train this; None where any loop can that calls the hooks."""
        return None

    def has_steps(self) -> bool:
        """Does something happen between steps, or must checkpoints hold more than `save` writes?"""
        for component in self.components:
            if component.memory():
                return True
            for hook in STEP_HOOKS:
                if getattr(type(component), hook) is not getattr(Component, hook):
                    return True
        return False

    # --- which row is read, over all components

    def follows_rows(self) -> bool:
        """Must the tuner hear of which row of the batch everything is?"""
        return any(component.per_row for component in self.components)

    def announce_rows(self, batch: Batch, rows: Tensor) -> None:
        """Architectures say so before the network reads (see `Component.on_rows`)."""
        for component in self.components:
            component.on_rows(batch, rows)

    def announce_prompts(self, prompts: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> None:
        """Writers say so before the network reads prompts (see `Component.on_prompts`)."""
        for component in self.components:
            component.on_prompts(prompts, rows)

    def announce_selected(self, index: Tensor) -> None:
        """Writers say so where sequences are multiplied or leave (see `Component.on_selected`)."""
        for component in self.components:
            component.on_selected(index)

    # --- vectors before the text, and embeddings

    @property
    def rewrites_inputs(self) -> bool:
        """Is the network handed embeddings, and not the tokens' own?"""
        return bool(self.virtual) or self.changes_inputs

    def input_change(self, places: Tensor) -> Tensor:
        """Where `changes_inputs`: places [...] of tokens in their prompts, -1 for all other tokens ->
        [..., width] what is added to their embeddings.
        """
        raise NotImplementedError

    def soft(self) -> Tensor:
        """[virtual, width] what stands before every sequence, where `virtual` is not 0."""
        raise NotImplementedError

    def distinguishes_rows(self) -> bool:
        """Are equal tokens of different rows read differently?"""
        own = type(self).soft_rows is not TunedModel.soft_rows
        # a token of one row's prompt may be another's completion
        return self.follows_rows() or own or self.changes_inputs

    def soft_rows(self, batch: Batch) -> Tensor:
        """[G, virtual, width] what stands before each row of a batch."""
        return self.soft().expand(len(batch.rows), -1, -1)

    # --- other readings of the same network

    def off(self) -> AbstractContextManager:
        """The untuned model, for a while."""
        raise RecipeError(f"tuner '{self.settings.name}' cannot be disabled")

    def merged(self) -> AbstractContextManager:
        """The tuned model as one plain network, for a while: yields it, and undoes the merge afterwards."""
        raise RecipeError(f"tuner '{self.settings.name}' cannot be merged into the weights")

    def why_not_batched(self) -> str | None:
        """Why runs with this tuner cannot share one pass over their base (train/batched_forward.py); None
        where they can: each of `layers` then has a `batched_forward`.
        """
        return f"tuner '{self.settings.name}' changes more than LoRA on linear layers does"

    # --- files

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors that a run in `folder` ended with, for `load`. Raises RecipeError, Damaged among
        others.
        """
        moment = checkpoints.load_newest(folder)
        if moment is None:
            raise RecipeError(f"{folder} has no checkpoint to start from")
        return moment.tensors

    def save(self, folder: Path) -> None:
        """Write what a user takes away: an adapter, or the whole model."""
        raise NotImplementedError


class Untuned(TunedModel):
    """A model without trainable parameters: a teacher, a frozen reference."""

    def __init__(self, model: Network):
        super().__init__(None, model)

    def off(self) -> AbstractContextManager:
        return nullcontext()
