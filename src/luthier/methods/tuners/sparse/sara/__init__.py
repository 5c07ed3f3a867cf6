"""SaRA: trains the entries of smallest magnitude of every weight, which contribute least to the base model;
all others are frozen.

Stored as positions and values, so gradients and optimizer state are only those of the trained entries.
Halfway, entries that have grown past the threshold are frozen at their value, and the optimizer state of
those that are still small is reset. In each step one randomly drawn weight also gets the gradient of
lambda_rank times the nuclear norm of its trained part: U V'. Departs from the paper: it has one threshold for
Stable Diffusion's weights (2e-3); here it is that value or, per weight, the magnitude of the largest of its
smallest `density` entries.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners.sparse._sparse import Sparse, spread
from luthier.registry import tuner


@tuner(
    paper="arXiv:2409.06633",
    row="sara-sparse",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you want to add a skill while training only the weights that matter least to the base"
    " model: the smallest ones.",
    costs="values and positions of the trained entries; whole gradients of a matrix are computed and"
    " then reduced to them.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
    covers="small weights trained, with state for them alone, and the nuclear norm's pull.",
    omits="diffusion models.",
    tests=[
        "methods/tuners/sparse/test_sara.py::test_sara_support_state_and_rest",
        "methods/tuners/sparse/test_sara.py::test_sara_threshold_and_nuclear_norm",
        "methods/tuners/sparse/test_sara.py::test_small_weights_carry_little",
    ],
)
class SaRA(Sparse):
    """Progressive sparse low-rank adaptation."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)

    # share of each weight that is trained, where no threshold is given
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    # train the entries below this magnitude; replaces density
    threshold: Annotated[float, Field(gt=0)] | None = None
    # weight of the nuclear norm, which favours low rank; 0 = none
    lambda_rank: Annotated[float, Field(ge=0)] = 5e-4
    # the nuclear norm is applied to weights whose shorter side is larger than this; to all, if there are
    # none
    min_side: int = 64
    # when entries that have grown are frozen, as a share of the run; 1 = never
    progressive: Annotated[float, Field(ge=0, le=1)] = 0.5

    def attach(self, model):
        from luthier.methods.tuners.sparse.sara.tuned import SaRAModel

        return SaRAModel(self, model)

    def count(self, W):
        return super().count(W) if self.threshold is None else int((W.float().abs() < self.threshold).sum())

    def support(self, W):
        k = self.count(W)
        if not k:
            raise RecipeError(
                f"tuner 'sara': no entry of a {tuple(W.shape)} weight is below threshold {self.threshold:g};"
                " raise it, or use density"
            )
        return W.float().abs().flatten().topk(k, largest=False).indices

    def entries(self, W, p):
        """[k] the tuned entries."""
        return W.flatten()[p.indices.long()].float() + p.values

    def small(self, W, p):
        """[k] which entries are still below the threshold."""
        start = W.flatten()[p.indices.long()].float().abs()
        limit = self.threshold if self.threshold is not None else start.max()
        return self.entries(W, p).abs() <= limit

    def masked(self, W, p):
        """[out, in] the tuned weight where it moves, zero elsewhere."""
        return spread(self.entries(W, p), p.indices, W.shape)
