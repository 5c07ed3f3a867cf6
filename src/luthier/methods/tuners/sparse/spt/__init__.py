"""SPT: spends a budget of trainable parameters where the loss is most sensitive, on single entries, or on
LoRA where a weight has many sensitive ones.

The sensitivity of an entry is its squared gradient, summed over a few batches of the data. The most sensitive
entries of all chosen weights are marked; a weight with at least (parameters of its LoRA) / alpha marks gets
LoRA instead, and in the others the marked entries are trained. The number of marks is chosen so that the
trainable parameters meet the budget. Before rows are read, entries are drawn at random. Departs from the
paper: matrices only, no vectors; LoRA as the structured part (the paper also has adapters); the budget that
the LoRAs leave is used up exactly. While sensitivities are compared they take one fp32 number per weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.sparse._sparse import Sparse
from luthier.registry import INTERNAL, family, tuner


@tuner(
    example={"r": 2, "init_rows": 2},
    paper="arXiv:2303.08566",
    row="spt-sensitivity",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you have a fixed budget of trainable parameters and want it spent where the loss is most"
    " sensitive.",
    costs="a pass over `init_rows` rows with one fp32 number a weight; then as a LoRA of the same budget.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
)
class SPT(Sparse):
    """Sensitivity-aware tuning."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)
    on_quantized: ClassVar[bool] = False  # sensitivities are gradients of dense weights

    budget: Annotated[int, Field(ge=1)] | None = None  # trainable parameters; null: use density
    # LoRA where its parameters are at most alpha per sensitive entry; 0 = never
    alpha: Annotated[float, Field(ge=0)] = 10.0
    r: Annotated[int, Field(ge=1)] = 8  # rank of the LoRAs
    init_rows: Annotated[int, Field(ge=1)] = 64  # rows on which sensitivities are measured
    # module -> trainable entries, or minus the rank of its LoRA; filled in from the rows
    plan: Annotated[dict[str, int] | None, INTERNAL] = None

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners.sparse.spt.tuned import SPTModel

        fitted = self
        if self.plan is None:
            sizes = {n: m.weight.numel() for n, m in chosen_modules(self, model).items()}
            budget = self.budget or max(1, round(self.density * sum(sizes.values())))
            if budget > sum(sizes.values()):
                raise RecipeError(
                    f"tuner 'spt': budget {budget} is more than the {sum(sizes.values())}"
                    " weights of the chosen modules; lower it"
                )
            even = {n: max(1, round(budget * s / sum(sizes.values()))) for n, s in sizes.items()}
            fitted = replace(
                self, budget=budget, plan=even, target_modules=list(sizes), layers_to_transform=None
            )
        return SPTModel(fitted, model)

    def at(self, name):
        if self.plan is None:  # outside a run: entries drawn at random, as before rows are read
            if self.budget is not None:
                raise ValueError(
                    "tuner 'spt' spends its budget over all chosen modules before it is attached; leave"
                    " budget out and give density"
                )
            return Entries(density=self.density)
        count = self.plan.get(name, 0)
        return LowRank(r=-count) if count < 0 else Entries(n=count)

    def planned(self, scores: dict[str, torch.Tensor]) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """module -> [out, in] sensitivities: the plan, and the flat places of each module that moves entry by
        entry.
        """
        budget = self.budget or 1
        every = torch.cat([s.flatten() for s in scores.values()])
        order, ends = (
            every.argsort(descending=True),
            torch.tensor([s.numel() for s in scores.values()]).cumsum(0),
        )
        owner = torch.searchsorted(ends, order, right=True)  # whose each entry is, the most sensitive first
        costs = {n: self.r * sum(s.shape) for n, s in scores.items()}

        def layout(tau: int) -> tuple[dict[str, int], int]:
            counts = dict(
                zip(scores, torch.bincount(owner[:tau], minlength=len(scores)).tolist(), strict=True)
            )
            plan = {n: -self.r if c and c * self.alpha >= costs[n] else c for n, c in counts.items()}
            return plan, sum(costs[n] if c < 0 else c for n, c in plan.items())

        low, high = 1, len(order)
        while low < high:  # the largest tau within the budget
            middle = (low + high + 1) // 2
            low, high = (middle, high) if layout(middle)[1] <= budget else (low, middle - 1)
        plan = layout(low)[0]
        left = budget - sum(costs[n] for n, c in plan.items() if c < 0)
        starts = ends - torch.tensor([s.numel() for s in scores.values()])
        single = torch.tensor([c > 0 for c in plan.values()])
        taken = order[single[owner]][: max(0, left)]
        mine = torch.searchsorted(ends, taken, right=True)
        places = {n: taken[mine == i] - starts[i] for i, n in enumerate(scores) if plan[n] > 0}
        return {n: len(places[n]) if n in places else c for n, c in plan.items()}, places


@family
class Entries(Sparse):
    """Some entries of a weight."""

    name: ClassVar[str] = "spt"
    provides: ClassVar[frozenset[str]] = frozenset({DISABLE_ADAPTER, MERGE})
    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)
    n: int | None = None  # of them; not given: by density

    def count(self, W):
        return super().count(W) if self.n is None else self.n


@family
class LowRank(Delta):
    """W + B A, B zero at the start."""

    name: ClassVar[str] = "spt"
    provides: ClassVar[frozenset[str]] = frozenset({DISABLE_ADAPTER, MERGE})
    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)
    r: int  # rank

    def init(self, W):
        return {"A": torch.randn(self.r, W.shape[1]) / self.r, "B": torch.zeros(W.shape[0], self.r)}

    def weight(self, W, p):
        return W + (p.B @ p.A).to(W.dtype)

    def forward(self, x, y, p, layer):
        return y + (x @ p.A.T) @ p.B.T

    def factors(self, p):
        return p.A, p.B
