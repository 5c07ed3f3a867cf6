"""SPT: spends a budget of trainable parameters where the loss is most sensitive, on single entries, or on a
structured module where a weight has many sensitive ones.

The sensitivity of an entry is its squared gradient, summed over a few batches of the data. The most sensitive
entries of all chosen weights are marked; a weight with at least (parameters of its module) / alpha marks gets
a module instead, and in the others the marked entries are trained. The module is a LoRA, or with `structure:
adapter` a bottleneck behind the weight's output, y + up(gelu(down(y))). With `vectors: true` norms and biases
take part: one with marks on at least a share 1/beta of its numbers is trained whole. The number of marks is
chosen so that the trainable parameters meet the budget. Before rows are read, entries are drawn at random.
Departs from the paper: vectors only on request; the budget that the modules leave is used up exactly. While
sensitivities are compared they take one fp32 number per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import RMSNorm
from luthier.methods.tuners.sparse._sparse import Sparse
from luthier.methods.tuners.sparse.spt.parts import part_for
from luthier.registry import INTERNAL, tuner


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
    covers="the budget is met; alpha decides between entries and modules; sensitivities are sums of "
    "squared gradients; what moves is the plan; over four fifths of the budget land in the one "
    "layer that matters; norms and biases with a fifth of their numbers marked are trained whole;"
    " adapters as the structured module.",
    omits="the grid over budgets (the number of marks is found exactly instead); images.",
    tests=[
        "methods/tuners/sparse/test_spt.py::test_spt_plan",
        "methods/tuners/sparse/test_spt.py::test_spt_on_a_model",
        "methods/tuners/sparse/test_spt.py::test_spt_puts_the_budget_where_the_task_is",
        "methods/tuners/sparse/test_spt.py::test_spt_trains_vectors_whole",
        "methods/tuners/sparse/test_spt.py::test_spt_with_adapters",
    ],
)
class SPT(Sparse):
    """Sensitivity-aware tuning."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear, nn.LayerNorm, RMSNorm)
    on_quantized: ClassVar[bool] = False  # sensitivities are gradients of dense weights
    starts_from_rows: ClassVar[bool] = True  # where the entries are, follows from rows

    budget: Annotated[int, Field(ge=1)] | None = None  # trainable parameters; null: use density
    # a module where its parameters are at most alpha per sensitive entry; 0 = never
    alpha: Annotated[float, Field(ge=0)] = 10.0
    structure: Literal["lora", "adapter"] = "lora"  # what this module is; an adapter cannot be merged
    r: Annotated[int, Field(ge=1)] = 8  # rank of the LoRAs, or width of the adapters
    vectors: bool = False  # norms and biases as well
    # a vector is trained whole where a share 1/beta of its numbers is sensitive; 0 = never
    beta: Annotated[float, Field(ge=0)] = 5.0
    init_rows: Annotated[int, Field(ge=1)] = 64  # rows on which sensitivities are measured
    # module (or its vector: module.weight of a norm, module.bias) -> trainable entries, or minus the size of
    # its structured module; filled in from the rows
    plan: Annotated[dict[str, int] | None, INTERNAL] = None

    @property
    def active_provides(self):
        return self.provides if self.structure == "lora" else self.provides - {MERGE}

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners._peft.targets import as_list
        from luthier.methods.tuners.sparse.spt.tuned import SPTModel, vectors_of

        fitted = self
        if self.plan is None:
            modules = chosen_modules(self, model, required=not self.vectors)
            sizes = {n: m.weight.numel() for n, m in modules.items()}
            targets = list(sizes)
            if self.vectors:
                vectors = vectors_of(model, modules, as_list(self.layers_to_transform))
                sizes |= {key: p.numel() for key, p in vectors.items()}
                targets += [key.removesuffix(".weight") for key in vectors if key.endswith(".weight")]
            budget = self.budget or max(1, round(self.density * sum(sizes.values())))
            if budget > sum(sizes.values()):
                raise RecipeError(
                    f"tuner 'spt': budget {budget} is more than the {sum(sizes.values())}"
                    " weights of the chosen modules; lower it"
                )
            even = {n: max(1, round(budget * s / sum(sizes.values()))) for n, s in sizes.items()}
            fitted = replace(self, budget=budget, plan=even, target_modules=targets, layers_to_transform=None)
        attached = SPTModel(fitted, model)
        if self.target_modules == "all-linear":
            attached.warnings += attached.experts_left_out("all-linear")
        return attached

    def at(self, name):
        if self.plan is None and self.budget is not None:  # outside a run
            raise ValueError(
                "tuner 'spt' spends its budget over all chosen modules before it is attached; leave"
                " budget out and give density"
            )
        return part_for(name, self.plan, self.structure, self.density)

    def structured(self, shape: torch.Size, count: int) -> bool:
        """With so many marked entries, does a weight get a module, or is a vector trained whole?"""
        if len(shape) == 1:
            return count > 0 and count * self.beta >= shape[0]
        return count > 0 and count * self.alpha >= self.module_cost(shape)

    def cost(self, shape: torch.Size, count: int) -> int:
        """Trainable parameters of a weight, or vector, with so many marked entries."""
        if not self.structured(shape, count):
            return count
        return shape[0] if len(shape) == 1 else self.module_cost(shape)

    def module_cost(self, shape: torch.Size) -> int:
        """Parameters of the structured module of a weight [out, in]."""
        if self.structure == "lora":
            return self.r * sum(shape)
        return 2 * self.r * shape[0] + self.r + shape[0]

    def planned(self, scores: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Name -> sensitivities, [out, in] or [n]: the plan, and the flat places of what moves entry by
        entry.
        """
        budget = self.budget or 1
        every = torch.cat([s.flatten() for s in scores.values()])
        order, ends = (
            every.argsort(descending=True),
            torch.tensor([s.numel() for s in scores.values()]).cumsum(0),
        )
        owner = torch.searchsorted(ends, order, right=True)  # whose each entry is, the most sensitive first

        def marks(tau: int) -> dict[str, int]:
            counts = torch.bincount(owner[:tau], minlength=len(scores)).tolist()
            return dict(zip(scores, counts, strict=True))

        def total(tau: int) -> int:
            return sum(self.cost(scores[n].shape, c) for n, c in marks(tau).items())

        low, high = 1, len(order)
        while low < high:  # the largest tau within the budget
            middle = (low + high + 1) // 2
            low, high = (middle, high) if total(middle) <= budget else (low, middle - 1)
        counts = marks(low)
        structured = {n for n, c in counts.items() if self.structured(scores[n].shape, c)}
        left = budget - sum(self.cost(scores[n].shape, counts[n]) for n in structured)
        starts = ends - torch.tensor([s.numel() for s in scores.values()])
        single = torch.tensor([c > 0 and n not in structured for n, c in counts.items()])
        taken = order[single[owner]][: max(0, left)]
        mine = torch.searchsorted(ends, taken, right=True)
        plan: dict[str, Any] = {}
        places = {}
        for i, (name, score) in enumerate(scores.items()):
            plan[name] = 0
            if name in structured and score.ndim == 2:
                plan[name] = -self.r
            elif counts[name]:
                own = torch.arange(score.numel()) if name in structured else taken[mine == i] - starts[i]
                places[name], plan[name] = own, len(own)
        return plan, places
