"""LoRA-Pro: steps A and B so that together they come as near as they can to a step of the whole weight.

With W = W0 + s B A, steps dA and dB move the weight by s (B dA + dB A). LoRA's own gradients are not the ones
for which that is nearest to the whole weight's gradient; these follow from them in closed form, up to a
matrix X that moves the weight by nothing and is chosen so that dA and dB stay near LoRA's (a Sylvester
equation). The nearest gradient goes through `inner` at full size, as in the authors' code, and the result is
turned into steps of A and B by the same formulas; `inner: []` is plain SGD, without any state. All tensors
but those of a LoRA on a linear module go through `inner` as they are. Departs: weight decay is that of the
chain, on A and B.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from luthier.methods.transforms._base import Transform, apply_chain
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import INTERNAL, nested_list, transform

SMALL = 1e-8  # added to the diagonals of what is inverted


@transform(
    paper="arXiv:2407.18242",
    row="lora-pro",
    use_when="tuner is `lora` and you want to come nearer to full fine-tuning at the same rank.",
    costs="with `inner: [adam]` two fp32 numbers for each weight of the adapted matrices (not of A and B);"
    " a few products with r x r matrices.",
    starting_rate="the paper takes 2e-5 to 1e-4: full fine-tuning's.",
    rate_factor=0.2,
    covers="the gradients nearest to the whole weight's, which do not depend on X; the X nearest to LoRA's"
    " own; the first step, where B is zero; Adam at full size; a loss that falls below LoRA's.",
    omits="weight decay of the whole weight.",
    tests=[
        "methods/transforms/projection/test_lora_pro.py::test_the_weight_moves_as_near_to_its_gradient_as_can_be",
        "methods/transforms/projection/test_lora_pro.py::test_x_solves_its_equation_and_moves_nothing",
        "methods/transforms/projection/test_lora_pro.py::test_sgd_falls_at_each_step_and_below_loras",
        "methods/transforms/projection/test_lora_pro.py::test_adam_is_that_of_the_whole_weight",
    ],
)
class LoRAPro(Transform):
    """The full gradient's nearest steps of A and B."""

    # transforms of the full gradient; [] leaves it as it is
    inner: Annotated[tuple[Any, ...], nested_list("transform")] = ("adam",)
    # what it is applied to; filled in when a run begins
    attached: Annotated[Any, INTERNAL] = None

    def bind(self, attached):
        inner = tuple(transform.bind(attached) for transform in self.inner)
        return replace(self, attached=attached, inner=inner)

    def apply(self, grads, state, group, step):
        scale = self.scale(group.name)
        if scale is None or not {"A", "B"} <= grads.keys():
            return apply_chain(self.inner, grads, state, group, step)
        A, B = group.params["A"], group.params["B"]
        steps = nearest(A, B, grads["A"], grads["B"], scale)
        if self.inner:
            whole = moved(A, B, *steps, scale)
            params: Any = {"weight": whole}
            weight = ParamGroup(group.name, params, group.by)
            step_of_weight = apply_chain(self.inner, {"weight": whole}, state, weight, step)["weight"]
            steps = nearest(A, B, scale * B.T @ step_of_weight, scale * step_of_weight @ A.T, scale)
        return {**grads, "A": steps[0], "B": steps[1]}

    def scale(self, name: str) -> float | None:
        """s of the LoRA of this name; None of what is none, or lies on no linear module."""
        layer = getattr(self.attached, "layers", {}).get(name)
        scaling = getattr(layer, "scaling", None)
        if layer is None or not scaling or isinstance(layer.get_base_layer(), nn.Embedding):
            return None
        return float(next(iter(scaling.values())))


def nearest(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] and their gradients -> the steps (dA, dB) for which scale * (B dA + dB A) is
    nearest to the gradient of the whole weight, and of these the ones nearest to (gA, gB).
    """
    AA = A @ A.T
    if not B.any():  # at the start: A cannot move the weight
        return gA, solved(AA, gB.T).T / scale**2
    BB = B.T @ B
    plain = solved(BB, gA) / scale**2
    beyond = gB - B @ solved(BB, B.T @ gB)
    X = sylvester(BB, AA, -plain @ A.T)
    return plain + X @ A, solved(AA, beyond.T).T / scale**2 - B @ X


def moved(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Tensor:
    """[out, in] how these steps move the weight."""
    return scale * (B @ dA + dB @ A)


def solved(S: Tensor, Y: Tensor) -> Tensor:
    """S^-1 Y of a symmetric S [r, r], in fp64: it is small, and often nearly singular."""
    wide = S.double() + SMALL * torch.eye(len(S), dtype=torch.float64, device=S.device)
    return (torch.linalg.pinv(wide, hermitian=True) @ Y.double()).to(Y.dtype)


def sylvester(BB: Tensor, AA: Tensor, C: Tensor) -> Tensor:
    """X of BB X + X AA = C, both symmetric and not negative."""
    b, U = torch.linalg.eigh(BB.double())
    a, V = torch.linalg.eigh(AA.double())
    total = (b.clamp(min=0)[:, None] + a.clamp(min=0)[None]).clamp(min=SMALL)
    return (U @ ((U.T @ C.double() @ V) / total) @ V.T).to(C.dtype)
