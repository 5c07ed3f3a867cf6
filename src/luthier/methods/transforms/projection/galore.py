"""GaLore: projects the gradient of a matrix onto its main singular directions, so that the optimizer's state
has only that many rows.

Every `update_proj_gap` steps the directions are computed anew from the gradient's SVD, on its shorter side;
`inner` processes the projected gradient, and its update is projected back. Only matrices in layers are
projected: embeddings, head, vectors and matrices no larger than `rank` go to `inner` unprojected, so with
full rank the step is that of `inner`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.transforms._base import Transform, apply_chain
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import nested_list, transform

IN_LAYER = re.compile(r"\.\d+\.")


@transform(
    paper="arXiv:2403.03507",
    use_when="you fine-tune all weights and the optimizer's state does not fit.",
    costs="optimizer state of `rank` rows for each matrix, and a singular value decomposition of each"
    " gradient every `update_proj_gap` steps.",
    starting_rate="start with that of `full`; `scale` multiplies it for projected matrices.",
)
class GaLore(Transform):
    """Gradient low-rank projection."""

    rank: Annotated[int, Field(ge=1)] = 128  # rank of the projection
    update_proj_gap: Annotated[int, Field(ge=1)] = 200  # steps between two updates of the projection
    scale: float = 0.25  # scale of projected updates; OwLore uses 1
    inner: Annotated[tuple[Any, ...], nested_list("transform")] = (
        "adam",
    )  # transform of the projected gradient

    def apply(self, grads, state, group, step):
        projected, params = {}, {}
        fit = IN_LAYER.search(f"{group.name}.") is not None
        for slot, G in grads.items():
            if not fit or G.ndim != 2 or min(G.shape) <= self.rank:
                projected[slot], params[slot] = G, group.params[slot]
                continue
            own = state.setdefault("basis", {}).setdefault(slot, {"age": 0})
            if own["age"] % self.update_proj_gap == 0:
                own["P"] = directions(G, self.rank)
            own["age"] += 1
            projected[slot] = params[slot] = self.down(G, own["P"])
        updates = apply_chain(
            self.inner,
            projected,
            state.setdefault("inner", {}),
            ParamGroup(group.name, params, group.by),
            step,
        )
        bases = state.get("basis", {})
        return {
            k: self.scale * self.up(u, bases[k]["P"], grads[k].shape) if k in bases else u
            for k, u in updates.items()
        }

    def down(self, G, P):
        return P.T @ G if G.shape[0] < G.shape[1] else G @ P

    def up(self, R, P, shape):
        return P @ R if shape[0] < shape[1] else R @ P.T


def directions(G: torch.Tensor, rank: int) -> torch.Tensor:
    """[shorter side, rank] the main singular directions of a gradient [m, n]."""
    U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
    return (U[:, :rank] if G.shape[0] < G.shape[1] else Vh[:rank].T).to(G.dtype).contiguous()
