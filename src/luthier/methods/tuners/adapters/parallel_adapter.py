"""Parallel adapters: a bottleneck beside a linear module. It reads the module's input and adds to the
module's output.

As in LLM-Adapters, beside single linear modules; the paper's parallel adapter is beside a whole feed-forward
block.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._bottleneck import Bottleneck
from luthier.registry import tuner


@tuner(
    paper="arXiv:2110.04366",
    provides=[DISABLE_ADAPTER],
    use_when="you want adapters that can change what a layer computes by a non-linear path, beside its"
    " linear modules.",
    costs="a bottleneck beside each chosen module, in training and in inference (not mergeable).",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
)
class ParallelAdapter(Bottleneck):
    """Adapters beside linear modules."""

    parallel: ClassVar[bool] = True
