"""LT-SFT: trains all weights first, selects the K that changed most, resets all weights and then trains only
these K.

The sparse difference is the adapter. Adapters compose by addition, as in zero-shot transfer, where one
trained on a language's text and one trained on a task in another language are added (`PeftModel` with both
active, or one merged into the model on which the other is trained). K is counted over all chosen modules
together.

Departs: both phases are one run and share its learning-rate schedule (constant is closest to the paper's
two), and an adapter saved before the selection has the K largest differences at that point. K is selected at
once, not in several rounds, and without the L1 term. Norms are frozen unless named.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners.sparse._sparse import Sparse
from luthier.registry import INTERNAL, tuner


@tuner(
    paper="arXiv:2110.07560",
    row="lt-sft",
    provides=[DISABLE_ADAPTER, MERGE],
    contract={"accumulation": "a rank decides of each weight, and rounding of those that are about equal"},
    use_when="skills trained apart are to be combined by addition, such as a language and a task: it"
    " trains a sparse difference, and such differences add up.",
    costs="its first phase is full fine-tuning, memory included; only the second is sparse.",
    starting_rate="start with that of `full`, with a constant schedule.",
    default_rate=2e-5,
)
class LTSFT(Sparse):
    """Lottery-ticket sparse fine-tuning."""

    on_quantized: ClassVar[bool] = False  # its first phase moves whole weights
    changes_phase: ClassVar[bool] = True

    # share of the run's steps in which all weights are trained
    dense_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    # entries of each module; filled in when they are chosen
    counts: Annotated[dict[str, int] | None, INTERNAL] = None

    def attach(self, model):
        from luthier.methods.tuners.sparse.lt_sft.tuned import LotteryTicketModel

        return LotteryTicketModel(self, model)

    def at(self, name):
        if self.counts is None:
            raise ValueError(
                "tuner 'lt_sft' chooses its entries in the first phase of a run of luthier; PEFT loads what a"
                " run saved, and cannot begin one"
            )
        return replace(self, counts={"": self.counts.get(name, 0)})

    def count(self, W):
        return (self.counts or {}).get("", 0)

    def support(self, W):
        return torch.arange(self.count(W))
