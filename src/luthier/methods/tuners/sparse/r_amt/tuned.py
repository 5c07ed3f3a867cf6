"""R-AMT on a model: masks that are numbers while they are trained and bits in adapter files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.methods.tuners._peft import PeftTunedModel, config_for
from luthier.methods.tuners.sparse.r_amt.bits import pack, unpack

if TYPE_CHECKING:
    from luthier.model.network import Network


class MaskTunedModel(PeftTunedModel):
    """Masks are stored as bits in adapter files."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))

    def memory(self):
        return {k: p for k, p in self.parameters().items() if k.endswith(".M")}

    def adapter_state(self):
        state = super().adapter_state()
        masks = {k[:-1]: v > self.settings.threshold for k, v in state.items() if k.endswith(".M")}
        return {
            k: pack(masks[k[:-4]] & unpack(v, masks[k[:-4]].shape)) if k.endswith(".bits") else v
            for k, v in state.items()
            if k[-2:] != ".M"
        }

    def unpack(self, file):
        """M from the bits: where it started, or zero. The bits are all set again, so that training may
        unmask.
        """
        out = dict(file)
        for layer, M in ((n, p) for n, p in self.parameters().items() if n.endswith(".M")):
            stem = f"base_model.model.{layer[:-2]}.{self.placer.prefix}."
            bits = next(k for k in file if k.startswith(stem) and k.endswith(".bits"))
            out[bits[:-4] + "M"] = unpack(file[bits], M.shape).float() * self.settings.mask_init
            out[bits] = torch.full_like(file[bits], 255)
        return out
