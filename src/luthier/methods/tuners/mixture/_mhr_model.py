"""MHR on a model: which task each row is of, and how a run begins from an inventory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.methods.tuners._peft import ADAPTER, DeltaLayer
from luthier.methods.tuners.mixture._routed import NamedRows

if TYPE_CHECKING:
    from luthier.model.network import Network

ADAPTED = {"skills", "tasks", "train"}  # settings in which a start may differ


class MHRModel(NamedRows):
    """Rows are read under the mixture of their column `task`."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model)
        if settings.train == "routers":
            for layer in self.layers.values():
                if isinstance(layer, DeltaLayer):
                    params: Any = layer.adapter_params[ADAPTER]
                    params.A.requires_grad_(False)
                    params.B.requires_grad_(False)

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
