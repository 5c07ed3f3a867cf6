"""Houlsby's adapters: a bottleneck after attention and one after the feed-forward part of every layer, before the residual.

Departs: `up` starts at exactly zero (the paper: near it), and norms stay frozen unless `modules_to_save` names them.
"""

from __future__ import annotations

from luthier.registry import tuner
from luthier.methods.tuners.adapters._bottleneck import ATTENTION, FFN, Bottleneck


@tuner(paper="arXiv:1902.00751", gives="off")
class Houlsby(Bottleneck):
    """Two serial adapters a layer."""

    target_modules: str | list[str] = rf".*\.({ATTENTION}|{FFN})"  # the last linear modules of attention and of the feed-forward part
