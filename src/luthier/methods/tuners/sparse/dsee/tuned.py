"""DSEE on a model: the pruning during the run, and the smaller model that remains."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for, plain_state
from luthier.methods.tuners.pruned._elastic import Anatomy, reorder, sliced

if TYPE_CHECKING:
    from luthier.model.network import Network


class DSEEModel(PeftTunedModel):
    """The masks belong to the state, so a run that is resumed after the pruning has them."""

    def __init__(self, settings: Any, model: Network):
        self.anatomy = Anatomy(model, settings.name) if settings.structured else None
        if self.anatomy is not None:
            settings = replace(settings, groups=self.anatomy.groups)
        super().__init__(settings, model, config_for(settings, model))
        self.pruned = {n: m for n, m in self.layers.items() if isinstance(m, DeltaLayer)}
        scaled = [
            part for part, share in (("o", settings.head_sparsity), ("down", settings.ffn_sparsity)) if share
        ]
        for name in (
            layer[part] for layer in (self.anatomy.layers if self.anatomy else ()) for part in scaled
        ):
            if name not in self.pruned:
                raise RecipeError(
                    "tuner 'dsee': heads and units are scaled at their inputs, so"
                    f" target_modules must include {name}"
                )

    def on_phase(self, clock):
        how, due = self.settings, round(self.settings.prune_at * clock.total)
        for layer in self.pruned.values():
            p = layer.tensors(ADAPTER)
            if clock.step == due and (how.sparsity or how.structured):
                layer.methods[ADAPTER].prune(oriented(layer.get_base_layer()).detach(), p)
            if hasattr(p, "c"):
                p.c.requires_grad_(clock.step < due)
                p.c.grad = None
        return {}

    def extra_grads(self, group):
        c = getattr(self.pruned[group].tensors(ADAPTER), "c", None) if group in self.pruned else None
        return {} if c is None else {"c": self.settings.l1_weight * c.detach().sign()}

    def unit_mask(self, layer: dict[str, str], part: str) -> Tensor | None:
        """[units] which of the heads that `o` reads, or of the units that `down` reads, are still there;
        None: all.
        """
        c = (
            getattr(self.pruned[layer[part]].tensors(ADAPTER), "c", None)
            if layer[part] in self.pruned
            else None
        )
        return None if c is None else c.detach() != 0

    def sliced(self, heads: bool = True) -> Any:
        """The tuned network as a plain one without what has left; heads: slice these, too."""
        if self.anatomy is None:
            raise RecipeError(
                "tuner 'dsee' removes whole heads or units only with head_sparsity or ffn_sparsity"
            )
        with self.merged():
            state = plain_state(self.model)
        plain: Any = type(self.model)(copy.deepcopy(self.model.config))
        plain = plain.to(next(iter(state.values())).device, self.model.dtype)
        plain.load_state_dict(state)
        shape = []
        for layer in self.anatomy.layers:
            left = [*self.anatomy.whole[0]]
            for which, part in enumerate(("o", "down")):
                mask = self.unit_mask(layer, part) if heads or part == "down" else None
                if mask is not None:
                    reorder(plain, layer, which, mask.logical_not().to(torch.uint8).argsort(stable=True))
                    left[which] = int(mask.sum())
            shape.append(tuple(left))
        return sliced(plain.eval(), self.anatomy, tuple(shape))

    def export_merged(self, folder):
        """Without the units that have left, and without the heads where a config can say so many heads of
        that size.
        """
        if self.anatomy is None:
            return super().export_merged(folder)
        self.sliced(heads=hasattr(self.model.config.get_text_config(), "head_dim")).save_pretrained(folder)
