"""Takes a tuner through the steps of a loop that is not luthier's, by hooks on its network and its optimizer.

A step begins with the first forward pass that has a gradient, and ends when the optimizer has stepped. So
accumulation, evaluation between steps and generation need nothing further.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from luthier.clock import Clock
from luthier.errors import RecipeError, Refused
from luthier.storage import tuner_state

if TYPE_CHECKING:
    from luthier.methods.transforms._base import GradientMoments
    from luthier.methods.tuners._base import TunedModel

# of torch's Adam and its relatives: the mean gradient, and the mean of its squares
MEAN, SQUARE = "exp_avg", "exp_avg_sq"


class Steps:
    """The steps of one tuned model. Until `follow` names the optimizer, training it is refused."""

    def __init__(self, tuned: TunedModel, module: nn.Module, seed: int = 0):
        """module: what the loop trains, around the tuned model or its network."""
        self.tuned, self.seed, self.name = tuned, seed, tuned.settings.name
        self.clock: Clock | None = None
        self.optimizer: Optimizer | None = None
        self.begun = -1  # the last step that has begun
        self._handles: list[Any] = []
        for parameter in tuned.parameters().values():  # an optimizer is to hold whatever trains at some time
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        for entrance in _entrances(tuned, module):
            entrance.register_forward_pre_hook(self._before_forward)

    def follow(self, optimizer: Any, total_steps: int, step: int = 0) -> None:
        """From now on the steps of this optimizer are the tuner's.

        Args:
            optimizer: of torch, or accelerate's wrapper of one; it must hold all parameters that the tuner
                trains at any time.
            total_steps: optimizer steps of the whole run.
            step: those that are behind it already.

        Raises:
            RecipeError: the optimizer is not torch's.
            Refused: it lacks parameters.
        """
        self.release()
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(optimizer, Optimizer):
            raise RecipeError(f"a torch optimizer is needed, and this is {type(optimizer).__name__}")
        covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
        absent = []
        for name, parameter in self.tuned.parameters().items():
            if parameter.is_floating_point() and id(parameter) not in covered:
                absent.append(name)
        if absent:
            raise Refused(
                f"the optimizer lacks {len(absent)} parameters that tuner '{self.name}' trains at some time"
                f" ({absent[0]}, ...); make it after luthier.attach, from all parameters that require a"
                " gradient"
            )
        self.optimizer, self.begun = optimizer, step - 1
        self.clock = Clock(self.seed, step, max(1, total_steps), step)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]

    def release(self) -> None:
        """The run is over; training is refused again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.clock, self.optimizer = [], None, None

    # --- the hooks

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.clock is None:
            raise Refused(
                f"tuner '{self.name}' changes what it trains, or keeps statistics, from step to step: give"
                " the trainer callbacks=luthier.callbacks(model), or call luthier.follow(model, optimizer,"
                " total_steps) before a loop of your own"
            )
        if self.begun < self.clock.step:
            self._begin(self.clock)

    def _begin(self, clock: Clock) -> None:
        if clock.step >= clock.total:
            raise RecipeError(f"the run was announced to have {clock.total} steps, and goes on after them")
        self.begun = clock.step
        with torch.no_grad():
            self.tuned.begin_step(clock)
        state = self.optimizer.state
        for name, parameter in self.tuned.parameters().items():
            resets, moments = self.tuned.resets.pop(name, None), self.tuned.moments.pop(name, None)
            if not parameter.requires_grad:
                parameter.grad = None
                state.pop(parameter, None)
            elif resets is not None and parameter in state:
                _reset(state[parameter], resets, moments)

    @torch.no_grad()
    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in self.tuned.param_groups():
            for component in self.tuned.components:
                for slot, extra in component.extra_grads(group.name).items():
                    parameter = group.params[slot]
                    if parameter.grad is not None:
                        parameter.grad.add_(extra.to(parameter.grad))

    def _after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        assert self.clock is not None
        if self.begun == self.clock.step:  # else no forward pass led to this update
            self.tuned.end_step(self.clock)
        self.clock.step += 1

    # --- checkpoints

    def _memory(self) -> dict[str, Tensor]:
        memory: dict[str, Tensor] = {}
        for component in self.tuned.components:
            memory |= component.memory()
        return memory

    def save(self, folder: Path) -> None:
        """Write what only training needs beside the weights in a checkpoint."""
        memory = self._memory()
        if memory:
            weights = tuner_state.fingerprint(self.tuned.parameters())
            tuner_state.write(folder, memory, weights)

    @torch.no_grad()
    def restore(self, folders: Iterable[Path]) -> None:
        """Go on from the folder whose weights are those that the network has now.

        Raises:
            Refused: none of the folders is it.
        """
        memory = self._memory()
        if not memory:
            return
        folders = list(folders)
        now = tuner_state.fingerprint(self.tuned.parameters())
        for folder in folders:
            if tuner_state.written_with(folder) == now:
                for name, tensor in tuner_state.read(folder).items():
                    memory[name].copy_(tensor)
                for component in self.tuned.components:
                    component.after_load()
                return
        raise Refused(
            f"tuner '{self.name}' cannot go on: the checkpoint's {tuner_state.NAME} is not in"
            f" {' or '.join(map(str, folders))}; resume from a checkpoint in the trainer's output_dir"
        )


def _entrances(tuned: TunedModel, module: nn.Module) -> Iterator[nn.Module]:
    """Modules of which every forward pass calls at least one, whatever a loop calls."""
    model: Any = tuned.model
    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    modules = (module, model, inner, model.get_input_embeddings())
    yield from {id(module): module for module in modules}.values()


def _reset(state: dict[str, Any], entries: Tensor, moments: GradientMoments | None) -> None:
    """An optimizer forgets some entries of a parameter (a mask), and learns what is known of their
    gradients.
    """
    for value in state.values():
        if torch.is_tensor(value) and value.shape == entries.shape:
            value[entries] = 0
    if moments is not None and MEAN in state and SQUARE in state:
        state[MEAN][entries] = moments.mean.to(state[MEAN])
        state[SQUARE][entries] = moments.square.to(state[SQUARE])
