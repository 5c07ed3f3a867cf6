"""Deltas with places that change while they are trained: their life on a model. Beside _peft.py, as
_peft_lora.py is.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, Layer, OnPeft, _plain_state, config_of, plain_settings
from luthier.methods.tuners.pruned._elastic import Anatomy, reorder, sliced

if TYPE_CHECKING:
    from luthier.model.network import Network


class Regrowing(OnPeft):
    """What is gathered toward the next exchange belongs to the state, so a run resumes amid an interval."""

    def __init__(self, settings: Any, model: Network):
        if (
            settings.watches(0)
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise RecipeError(
                f"tuner '{settings.name}': growth `ag` is for one process; on several take"
                " `selection_algorithm: ma`"
            )
        super().__init__(settings, model, config_of(type(settings))(**plain_settings(settings)))
        self.sparse = {n: m for n, m in self.layers.items() if isinstance(m, Layer)}
        self.gathered: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.sparse.items():
            p, shape = layer.tensors(ADAPTER), tuple(oriented(layer.get_base_layer()).shape)
            found = settings.nothing(shape, len(p.values), p.indices.dtype)
            self.gathered[name] = {k: t.to(p.values.device) for k, t in found.items()}
        self.masks: dict[str, Tensor] = {}

    def memory(self):
        return {f"{n}.{k}": t for n, found in self.gathered.items() for k, t in found.items()}

    def before_step(self, clock):
        method, share = self.settings, self.settings.share(clock.step, clock.total)
        for name, layer in self.sparse.items():
            p, found = layer.tensors(ADAPTER), self.gathered[name]
            if share:
                self.masks[name] = method.exchange(share, p.values, p.indices, found)
            if method.begins(clock.step):
                for t in found.values():
                    t.zero_()
            held = cast(Any, layer.held[ADAPTER])
            held.watch = (
                (lambda G, found=found: method.gather(G, found)) if method.watches(clock.step) else None
            )

    def reset_masks(self, group):
        mask = self.masks.pop(group, None)
        return {} if mask is None else {"values": mask}

    def after_step(self, clock):
        for name, layer in self.sparse.items():
            p = layer.tensors(ADAPTER)
            if p.values.grad is not None:
                self.settings.follow(p.values.grad, p.indices, self.gathered[name])


class Pruning(OnPeft):
    """The masks are part of the state: a run that goes on after the pruning finds them."""

    def __init__(self, settings: Any, model: Network):
        self.anatomy = Anatomy(model) if settings.structured else None
        if self.anatomy is not None:
            settings = replace(settings, groups=self.anatomy.groups)
        super().__init__(settings, model, config_of(type(settings))(**plain_settings(settings)))
        self.pruned = {n: m for n, m in self.layers.items() if isinstance(m, Layer)}
        scaled = [
            part for part, share in (("o", settings.head_sparsity), ("down", settings.ffn_sparsity)) if share
        ]
        for name in (
            layer[part] for layer in (self.anatomy.layers if self.anatomy else ()) for part in scaled
        ):
            if name not in self.pruned:
                raise RecipeError(
                    "tuner 'dsee': heads and units are scaled where they are read, so target_modules must"
                    f" hold {name}"
                )

    def before_step(self, clock):
        how, due = self.settings, round(self.settings.prune_at * clock.total)
        for layer in self.pruned.values():
            p = layer.tensors(ADAPTER)
            if clock.step == due and (how.sparsity or how.structured):
                layer.methods[ADAPTER].prune(oriented(layer.get_base_layer()).detach(), p)
            if hasattr(p, "c"):
                p.c.requires_grad_(clock.step < due)
                p.c.grad = None

    def extra_grads(self, group):
        c = getattr(self.pruned[group].tensors(ADAPTER), "c", None) if group in self.pruned else None
        return {} if c is None else {"c": self.settings.l1_weight * c.detach().sign()}

    def kept(self, layer: dict[str, str], part: str) -> Tensor | None:
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
                "tuner 'dsee' takes nothing out as a whole without head_sparsity or ffn_sparsity"
            )
        with self.merged():
            state = _plain_state(self.model)
        made: Any = type(self.model)(copy.deepcopy(self.model.config))
        made = made.to(next(iter(state.values())).device, self.model.dtype)
        made.load_state_dict(state)
        shape = []
        for layer in self.anatomy.layers:
            left = [*self.anatomy.whole[0]]
            for which, part in enumerate(("o", "down")):
                kept = self.kept(layer, part) if heads or part == "down" else None
                if kept is not None:
                    reorder(made, layer, which, kept.logical_not().to(torch.uint8).argsort(stable=True))
                    left[which] = int(kept.sum())
            shape.append(tuple(left))
        return sliced(made.eval(), self.anatomy, tuple(shape))

    def export_merged(self, folder):
        """Without the units that have left, and without the heads where a config can say so many heads of
        that size.
        """
        if self.anatomy is None:
            return super().export_merged(folder)
        self.sliced(heads=hasattr(self.model.config.get_text_config(), "head_dim")).save_pretrained(folder)
