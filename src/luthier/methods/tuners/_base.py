"""What moves. A tuner attaches to a model; what is attached can be listed, switched off, exchanged, merged
and saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    from luthier.model.batch import Batch
    from luthier.model.network import Network

DISABLE_ADAPTER = Capability(
    "disable_adapter",
    says="a tuner that can be switched off",
    advice="or use `roles: {reference: initial}`, which keeps a copy of the trainable parameters",
)
MERGE = Capability("merge", says="a tuner that can be merged into the weights")
LOW_RANK = Capability("low-rank", says="a low-rank tuner with factors A and B")


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

    def attach(self, model: Network) -> TunedModel:
        """Put the tuner on the model, in place. The tuned model starts as the base model."""
        raise NotImplementedError


class TunedModel:
    """A tuner on a model. Subclasses define `all_param_groups`; most also `off` and `merged`."""

    virtual = 0  # places the layout keeps free before every sequence (soft prompts)
    # hidden states below all layers that move, cached by a run (train/hidden_cache.py)
    hidden_cache: Any = None
    per_row = False  # must `reads` be told where the rows of a batch lie?
    told: tuple[str, ...] = ()  # sentences about what was attached, for whoever watches the run

    def __init__(self, settings: Any, model: Network):
        self.settings, self.model = settings, model

    # --- what moves

    def all_param_groups(self) -> list[ParamGroup]:
        """All sites, in a fixed order."""
        raise NotImplementedError

    def param_groups(self) -> list[ParamGroup]:
        """The sites that move now."""
        return [s for s in self.all_param_groups() if any(p.requires_grad for p in s.params.values())]

    def parameters(self) -> dict[str, nn.Parameter]:
        """'site.slot' -> parameter, of all sites."""
        return {f"{s.name}.{k}": p for s in self.all_param_groups() for k, p in s.params.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Tensors that never move and yet belong to the state (frozen factors that were made from data)."""
        return {}

    def memory(self) -> dict[str, Tensor]:
        """Tensors that only training needs (gathered toward the next decision): in checkpoints, not in what
        `save` writes.
        """
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """A copy of everything that this tuner may move: its whole state."""
        return {k: p.clone() for k, p in self.held().items()}

    def held(self) -> dict[str, Tensor]:
        """The same, not copied."""
        return {k: p.detach() for k, p in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        return {**self.parameters(), **self.buffers(), **self.memory()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors()` back. Raises RecipeError when names or shapes differ."""
        own = self._state()
        odd = sorted(own.keys() ^ tensors.keys()) + [
            k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape
        ]
        if odd:
            raise RecipeError(
                f"the saved tensors do not fit tuner '{self.settings.name}':"
                f" {', '.join(odd[:3])}{' ...' * (len(odd) > 3)}"
            )
        for name, p in own.items():
            p.copy_(tensors[name])

    # --- life of a run

    def initialize(self, rows: list[dict], roles: Any) -> None:
        """Once, before step 0, unless the run goes on from another: start from data (activations, gradients)."""

    def ready(self, rows: list[dict], roles: Any) -> None:
        """Once, before step 0, whatever the run starts from: what is kept beside the tensors that move."""

    def before_step(self, clock: Clock) -> None:
        """Decide what moves in this step."""

    def reset_masks(self, group: str) -> dict[str, Tensor]:
        """slot -> mask of the entries that begin anew in this step: the optimizer forgets what it knew of
        them. Asked once.
        """
        return {}

    def extra_grads(self, group: str) -> dict[str, Tensor]:
        """slot -> the gradient of a term of the tuner's own beside the loss (a penalty). Asked where a site
        is stepped.
        """
        return {}

    def after_step(self, clock: Clock) -> None:
        """After the update, gradients still there."""

    # --- vectors before the text

    def soft(self) -> Tensor:
        """[virtual, width] what stands before every sequence, where `virtual` is not 0."""
        raise NotImplementedError

    def soft_rows(self, batch: Batch) -> Tensor:
        """[G, virtual, width] what stands before each row of a batch."""
        return self.soft().expand(len(batch.rows), -1, -1)

    # --- what is read

    def reads(self, batch: Batch, rows: Tensor) -> None:
        """Told by architectures before the network runs: of which row of the batch each row [R], or place [R,
        W], of its tensors is.

        It holds until the next call, since backward may read again."""

    # --- other readings of the same network

    def off(self) -> AbstractContextManager:
        """The untuned model, for a while."""
        raise RecipeError(f"tuner '{self.settings.name}' cannot be switched off")

    @contextmanager
    def using(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Older, averaged or another task's tensors, for a while; nothing is copied."""
        own = self._state()
        kept = {k: p.data for k, p in own.items()}
        try:
            for k, p in own.items():
                p.data = tensors[k].to(p.dtype)
            yield
        finally:
            for k, p in own.items():
                p.data = kept[k]

    def merged(self) -> AbstractContextManager:
        """The tuned model as one plain network, for a while: yields it, and undoes the merge afterwards."""
        raise RecipeError(f"tuner '{self.settings.name}' cannot be merged into the weights")

    def why_not_batched(self) -> str | None:
        """Why runs with this tuner cannot share one pass over their base (train/batched_forward.py); None where
        they can: each of `layers` then has a `batched_forward`.
        """
        return f"tuner '{self.settings.name}' is more than LoRA on linear layers"

    # --- files

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors that a run in `folder` ended with, for `load`."""
        found = checkpoints.paths(folder)
        if not found:
            raise RecipeError(f"{folder} holds no checkpoint to start from")
        return checkpoints.load(found[-1]).tensors

    def save(self, folder: Path) -> None:
        """Write what a user takes away: an adapter, or the whole model."""
        raise NotImplementedError


class Untuned(TunedModel):
    """A model on which nothing moves: a teacher, a frozen reference."""

    def __init__(self, model: Network):
        super().__init__(None, model)

    def all_param_groups(self) -> list[ParamGroup]:
        return []

    def off(self) -> AbstractContextManager:
        return nullcontext()
