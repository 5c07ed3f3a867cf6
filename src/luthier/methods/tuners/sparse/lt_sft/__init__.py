"""LT-SFT: trains all weights first, selects the K that changed most, resets all weights and then trains only
these K.

The sparse difference is the adapter. Adapters compose by addition, as in zero-shot transfer, where one
trained on a language's text and one trained on a task in another language are added (`PeftModel` with both
active, or one merged into the model on which the other is trained). K is counted over all chosen modules
together.

With `rounds: n` K grows by a share of K/n in each: all weights are trained from where the last round's sparse
phase ended, those of the others that are furthest from their initial values are added, the weights go back to
where the round began, and what has been chosen so far is trained. `l1` and `sparse_l1` penalise the mean
distance from the initial weights in the two kinds of phases. `phase_schedule` begins the learning-rate
schedule anew in each phase, as the authors' code does, at the pace of the phase's length.

Departs: all phases are one run, and an adapter saved before a selection has the K largest differences at that
point. The mean of the penalty is over all parameters of the network, as in the authors' code, and the sum
over the chosen modules. Norms are frozen unless named.
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
    covers="exactly the K entries move that moved furthest before; with K = all it is full fine-tuning "
    "from the start; each of n rounds adds K/n entries and goes back to where it began; the L1 "
    "term is the penalty's gradient in both phases; each phase has a schedule of its own; "
    "differences add up in any order.",
    omits="drawing one of several source languages for each batch (multi-source); a source's difference"
    " is merged into the base instead.",
    tests=[
        "methods/tuners/sparse/test_lt_sft.py::test_lt_sft_chooses_what_moved_furthest_and_begins_again",
        "methods/tuners/sparse/test_lt_sft.py::test_lt_sft_with_all_places_is_full_tuning_from_the_start",
        "methods/tuners/sparse/test_lt_sft.py::test_lt_sft_chooses_in_rounds",
        "methods/tuners/sparse/test_lt_sft.py::test_lt_sft_penalises_the_distance",
        "methods/tuners/sparse/test_lt_sft.py::test_lt_sft_begins_the_schedule_anew",
        "methods/tuners/sparse/test_sparse.py::test_sparse_deltas_add_up",
    ],
)
class LTSFT(Sparse):
    """Lottery-ticket sparse fine-tuning."""

    on_quantized: ClassVar[bool] = False  # its first phase moves whole weights
    changes_phase: ClassVar[bool] = True

    # share of a round's steps in which all weights are trained
    dense_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    rounds: Annotated[int, Field(ge=1)] = 1  # selections, each of an equal share of the entries
    # weight of the mean |theta - theta_0| in dense phases (the paper's languages: 0.1)
    l1: Annotated[float, Field(ge=0)] = 0.0
    sparse_l1: Annotated[float, Field(ge=0)] = 0.0  # the same in sparse phases
    phase_schedule: bool = False  # begin the learning-rate schedule anew in each phase
    # entries of each module; filled in when they are chosen
    counts: Annotated[dict[str, int] | None, INTERNAL] = None

    def phase(self, step: int, total: int) -> tuple[int, bool, int, int]:
        """The round of a step, whether all weights are trained in it, and the phase's first step and the one
        behind its last.
        """
        turn, first = 0, 0
        while turn + 1 < self.rounds and step >= round((turn + 1) * total / self.rounds):
            turn += 1
            first = round(turn * total / self.rounds)
        end = round((turn + 1) * total / self.rounds)
        middle = first + round(self.dense_share * (end - first))
        if step < middle:
            return turn, True, first, middle
        return turn, False, middle, end

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
