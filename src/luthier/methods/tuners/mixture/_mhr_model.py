"""MHR on a model: which task each row is of, and how a run begins from an inventory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import RecipeError
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer
from luthier.methods.tuners.mixture._routed import RoutedModel
from luthier.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.model.network import Network

ADAPTED = {"skills", "tasks", "train"}  # settings in which a start may differ


class MHRModel(RoutedModel):
    """Rows are read under the mixture of their column `task`."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model)
        self.per_row = settings.tasks is not None
        if settings.train == "routers":
            for layer in self.layers.values():
                if isinstance(layer, DeltaLayer):
                    params: Any = layer.adapter_params[ADAPTER]
                    params.A.requires_grad_(False)
                    params.B.requires_grad_(False)

    def task_of(self, row: Any) -> int:
        """The number of a row's task; -1: it names none."""
        name = row.get("task")
        if name is None:
            return -1
        if str(name) not in self.settings.tasks:
            hint = did_you_mean(str(name), self.settings.tasks)
            raise RecipeError(f"a row has task '{name}', which tuner 'mhr' does not list in tasks{hint}")
        return self.settings.tasks.index(str(name))

    def routes(self, batch):
        return torch.tensor([self.task_of(row) for row in batch.rows])

    def prompt_routes(self, prompts, rows):
        if not rows:
            return torch.full((len(prompts),), -1)
        return torch.tensor([self.task_of(row) for row in rows])

    # --- a start from an inventory

    def _same_settings(self, saved, folder):
        mine = {key: value for key, value in saved.items() if key not in ADAPTED}
        super()._same_settings(mine, folder)

    def unpack(self, file):
        return {name: self.adapted(name, tensor) for name, tensor in file.items()}

    def read(self, folder):
        return {name: self.adapted(name, tensor) for name, tensor in super().read(folder).items()}

    def adapted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of another inventory as this one begins from it: one skill is the mean of all, and tasks
        that were not there begin anew.
        """
        how, slot = self.settings, name.rpartition(".")[2]
        if slot in ("A", "B") and how.skills == 1 and len(tensor) > 1:
            return tensor.mean(0, keepdim=True)
        shape = (len(how.tasks or [0]), how.heads, how.skills)
        if slot == "Z" and tuple(tensor.shape) != shape:
            return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        return tensor
