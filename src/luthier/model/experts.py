"""The experts of a mixture, which transformers holds as one tensor for all: apart, so that each matrix can
lie in codes of its own.

To tuners they are what they were, no linear modules: what a recipe moves does not depend on what its base is
kept in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOTS = ("gate_up_proj", "down_proj")  # [experts, out, in]


class Matrix(nn.Module):
    """One matrix of one expert."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_parameter("bias", None)
        self.size = (weight.shape[0], weight.shape[1])
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Experts(nn.Module):
    """`experts.3.down_proj` is the fourth expert's. Only the experts that some token visits are read."""

    def __init__(self, base: Any):
        super().__init__()
        # in a list, so that it is no submodule: its gate is used, and `together` puts it back
        self.base: list[Any] = [base]
        self.count = base.gate_up_proj.shape[0]
        for e in range(self.count):
            expert = nn.ModuleDict({slot: Matrix(getattr(base, slot)[e]) for slot in SLOTS})
            self.add_module(str(e), expert)
        self.train(base.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width]; top_k_index and top_k_weights [tokens, k]."""
        total, gate = torch.zeros_like(hidden_states), self.base[0]._apply_gate
        for e in top_k_index.unique().tolist():
            if e < self.count:
                token, place = torch.where(top_k_index == e)
                up = self.get_submodule(f"{e}.gate_up_proj")
                down = self.get_submodule(f"{e}.down_proj")
                output = down(gate(up(hidden_states[token])))
                weighted = output * top_k_weights[token, place, None]
                total = total.index_add(0, token, weighted.to(total.dtype))
        return total

    def together(self) -> nn.Module:
        """As transformers holds them, with the weights that they have now."""
        base = self.base[0]
        for slot in SLOTS:
            parts = []
            for e in range(self.count):
                parts.append(self.get_parameter(f"{e}.{slot}.weight").detach())
            base._parameters[slot] = nn.Parameter(torch.stack(parts), requires_grad=False)
        return base.train(self.training)


def fused(model: nn.Module) -> dict[str, nn.Module]:
    """The experts that can be taken apart: gate and up in one, no biases, laid out as Linear lays out its
    weight.
    """

    experts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        m: Any = module
        if not callable(getattr(m, "_apply_gate", None)) or set(m._parameters) != set(SLOTS):
            continue
        parameters = list(m.parameters())
        if len(parameters) != 2 or any(p.ndim != 3 for p in parameters):
            continue
        if m.is_transposed or m.has_bias or not m.has_gate or getattr(m, "has_post_expert_norm", False):
            continue
        experts[name] = m
    return experts


def joined_weights(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Weights [experts, out, in] of a mixture that lie in one tensor: module, name in it, tensor."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for slot, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3:
                yield name, slot, weight


def apart(model: nn.Module) -> dict[str, Experts]:
    """Take apart all that can be, with views of the tensors that are there. -> module -> its experts."""
    experts_of = {n: Experts(m) for n, m in fused(model).items()}
    for name, experts in experts_of.items():
        put(model, name, experts)
        for slot in SLOTS:  # or what becomes codes would be kept here
            experts.base[0]._parameters[slot] = None
    return experts_of


def join(model: nn.Module) -> None:
    """Experts as transformers holds them, for good."""
    for name, m in list(model.named_modules()):
        if isinstance(m, Experts):
            put(model, name, m.together())


def stacked(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's dense weights, with its experts under the names that transformers has for them."""
    state = dict(state)
    for name, m in model.named_modules():
        if isinstance(m, Experts):
            for slot in SLOTS:
                parts = [state.pop(f"{name}.{e}.{slot}.weight") for e in range(m.count)]
                state[f"{name}.{slot}"] = torch.stack(parts)
    return state


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place."""
    above, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(above), leaf, module)
