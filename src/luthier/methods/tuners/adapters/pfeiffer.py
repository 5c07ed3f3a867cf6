"""Pfeiffer adapters: one bottleneck per layer, after the feed-forward block, before the residual connection.

Departs: the paper's adapter is placed behind the residual's norm of post-norm encoders; this position also
suits pre-norm networks. `up` starts at exactly zero.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._bottleneck import Bottleneck
from luthier.registry import tuner


@tuner(
    paper="arXiv:2005.00247",
    provides=[DISABLE_ADAPTER],
    use_when="you want one bottleneck adapter per layer, half of Houlsby's size, as AdapterHub's tasks"
    " mostly use.",
    costs="one module a layer, in training and in inference (not mergeable).",
    starting_rate="start with that of `houlsby`.",
    default_rate=3e-4,
)
class Pfeiffer(Bottleneck):
    """One serial adapter per layer."""

    places: ClassVar[tuple[str, ...]] = ("down",)

    target_modules: str | list[str] = "auto"  # auto: the last linear modules of the feed-forward block
