"""One slot for adapters: which sublayer they change, what they read, by which function, and how the change is
put in.

Each setting is an axis of the unified view: `sublayers` (modified representation), `insertion` (parallel,
sequential), `non_linearity` (form; linear is low-rank) and `composition` (add; scaled; gated). Sequential at
both sublayers is Houlsby's, sequential at the feed-forward block Pfeiffer's, parallel and scaled the paper's
own, AdaptFormer's without its norm; linear beside a matrix and scaled by alpha / r is LoRA.

Departs: a parallel adapter reads what the sublayer's first matrix reads, which in pre-norm networks is behind
the norm; multi-head adapters, which change single heads, are left out. `up` starts at exactly zero.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._sublayer import SublayerAdapter
from luthier.registry import tuner


@tuner(
    paper="arXiv:2110.04366",
    row="unified-pet",
    provides=[DISABLE_ADAPTER],
    use_when="you choose an adapter by its parts: where it sits, what it reads, its function, its scale; the"
    " default is the scaled parallel adapter at feed-forward blocks.",
    costs="a bottleneck for each chosen sublayer, in training and in inference (not mergeable).",
    starting_rate="the paper takes 5e-5 for large bottlenecks; start with that of `houlsby`.",
    default_rate=3e-4,
    covers="parallel and sequential adapters at attention and feed-forward blocks, linear or not, added,"
    " scaled by a constant or a trained number, or gated; Mix-And-Match is tuner `mam`; prefixes as gated"
    " parallel adapters are shown as an identity.",
    omits="multi-head parallel adapters.",
    tests=[
        "methods/tuners/adapters/test_sublayer_adapter.py::test_a_prefix_is_a_gated_parallel_adapter",
        "methods/tuners/adapters/test_sublayer_adapter.py::test_linear_beside_a_matrix_is_lora",
        "methods/tuners/adapters/test_sublayer_adapter.py::test_it_reads_and_changes_what_it_says",
        "methods/tuners/adapters/test_sublayer_adapter.py::test_houlsby_and_pfeiffer_are_settings",
        "methods/tuners/adapters/test_sublayer_adapter.py::test_numbers_are_the_formula",
    ],
)
class UnifiedAdapter(SublayerAdapter):
    """A bottleneck at sublayers, composed from its parts."""

    # how the change d enters: h + d, h + s d, (1 - l) h + l d with a trained l that starts at 0, or d alone
    # (no residual within the adapter: training does not start at the base model)
    composition: Literal["add", "scaled", "gated", "replace"] = "scaled"
    scaling: Annotated[float, Field(gt=0)] = 4.0  # s
    learn_scaling: bool = False  # train s, from there

    def init(self, W):
        tensors = super().init(W)
        if self.composition == "gated":
            tensors["gate"] = torch.zeros(1)
        elif self.composition == "scaled" and self.learn_scaling:
            tensors["scale"] = torch.full((1,), self.scaling)
        return tensors

    def composed(self, y, change, p):
        if self.composition == "add":
            return y + change
        if self.composition == "replace":
            return change
        if self.composition == "gated":
            return (1 - p.gate) * y + p.gate * change
        return y + change * (p.scale if self.learn_scaling else self.scaling)
