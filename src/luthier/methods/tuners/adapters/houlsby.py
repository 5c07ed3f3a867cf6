"""Houlsby adapters: a bottleneck after attention and another after the feed-forward block of every layer,
before the residual connection.

Departs: `up` starts at exactly zero (the paper: near it), and norms stay frozen unless `modules_to_save`
names them.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._bottleneck import Bottleneck
from luthier.registry import tuner


@tuner(
    paper="arXiv:1902.00751",
    provides=[DISABLE_ADAPTER],
    use_when="you want classic bottleneck adapters at both places of a layer, for comparison with the"
    " literature or for keeping many tasks beside one encoder.",
    costs="two modules of width d / `reduction_factor` a layer, in training and in inference (not"
    " mergeable).",
    starting_rate="the paper tries 3e-5, 3e-4 and 3e-3.",
    default_rate=3e-4,
)
class Houlsby(Bottleneck):
    """Two serial adapters per layer."""

    places: ClassVar[tuple[str, ...]] = ("o", "down")

    # auto: the last linear modules of attention and of the feed-forward block
    target_modules: str | list[str] = "auto"
