"""PV-Tuning: fine-tunes a quantized model in both its parts, scales and code books by gradients (P) and the
codes by discrete steps (V).

V: an Adam step on the dequantized weight gives a target. Among the codes for which another value is nearer to
the target, only the few with the largest update change, and by no more than a fraction of the weight's norm.
The others keep their code: rounding all of them (straight-through) stalls, since small steps round back.
Updates that are not applied are carried to the next step (`delta_decay`). The paper's objective is `kl` with
the unquantized model as teacher.

New codes are the nearest ones; where a weight is a sum of vectors of several code books (quantizer `vq`),
they are found by its beam search (`beam_size`). Departs from the paper: codes that would not change do not
count among the few. In addition to the codes, training stores two numbers per weight.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from luthier.methods.quantizers._base import QUANTIZED_WEIGHTS
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE, Tuner
from luthier.registry import tuner


@tuner(
    paper="arXiv:2405.14852",
    row="pv-tuning",
    requires=[QUANTIZED_WEIGHTS],
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="the base is quantized to 1 to 4 bits and is to stay so: it trains scales, code books and"
    " the codes themselves, with no adapter beside them.",
    costs="beside the codes, two numbers a weight while it trains.",
    starting_rate="its recipe here takes 3e-4 for the continuous part; the codes have `code_lr`.",
    default_rate=3e-4,
    covers="V steps that never raise a quadratic loss, end near the best codes and change few of them; "
    "scales and books by gradients; a beam search over several code books (quantizer `vq`).",
    omits="QuIP#'s codes; several processes; the paper's models.",
    tests=[
        "methods/tuners/quantized/test_pv_tuning.py::test_a_v_step_never_raises_a_quadratic_loss",
        "methods/tuners/quantized/test_pv_tuning.py::test_v_steps_end_near_the_best_codes_of_twelve_weights",
        "methods/tuners/quantized/test_pv_tuning.py::test_pv_tuning_lowers_the_loss_and_few_codes_change",
        "methods/tuners/quantized/test_pv_tuning.py::test_pv_tuning_ends_lower_than_straight_through",
        "methods/quantizers/codebook/test_vq.py::test_a_beam_over_code_books_finds_the_best_sums",
    ],
)
class PVTuning(Tuner):
    """Trains the codes and their continuous parameters."""

    on_quantized: ClassVar[bool] = True

    code_lr: float = 1e-2  # size of the codes' Adam step, in the units of the weights
    code_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95  # beta2 of this Adam; its beta1 is 0
    # share of a weight's codes that may change in a step
    max_code_change_per_step: Annotated[float, Field(gt=0, le=1)] = 0.01
    # maximum relative change of a weight's norm in a step
    code_trust_ratio: Annotated[float, Field(gt=0)] = 0.01
    # share of the unapplied update that is dropped; 1 drops all of it
    delta_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    tune_rest: bool = True  # train norms, embeddings, head and biases as well

    def attach(self, model):
        from luthier.methods.tuners.quantized.pv_tuning.tuned import CodeTunedModel

        return CodeTunedModel(self, model)

    def nothing(self, size):
        """What a step remembers of a weight, at first."""
        return {"square": torch.zeros(size), "delta": torch.zeros(size)}

    def step(self, quantizer, codes, size, grad, memory, step):
        """Codes after one V step. grad [out, in] of the loss with respect to the weight; memory is changed in
        place.
        """
        memory["square"].mul_(self.code_beta2).addcmul_(grad, grad, value=1 - self.code_beta2)
        size_now = (memory["square"] / (1 - self.code_beta2**step)).sqrt_().add_(1e-8)
        W = quantizer.dequantize(codes, size, torch.float32)
        target = W + memory["delta"] - self.code_lr * grad / size_now
        new_codes = recode(
            quantizer, codes, size, target, self.max_code_change_per_step, self.code_trust_ratio
        )
        memory["delta"].copy_(
            (target - quantizer.dequantize(new_codes, size, torch.float32)) * (1 - self.delta_decay)
        )
        return new_codes


@torch.no_grad()
def recode(quantizer, codes, size, target, share: float = 1.0, trust: float = float("inf")):
    """Codes nearer to target [out, in]: at most `share` of them others, the weight's change at most `trust`
    of its length.
    """
    W = quantizer.dequantize(codes, size, torch.float32)
    new = quantizer.dequantize(quantizer.nearest(target, codes), size, torch.float32)
    d = quantizer.together
    units = lambda x: F.pad(x, (0, -size[1] % d)).view(-1, d)
    far, moved = units(target - W).square().sum(1), units(new - W).square().sum(1)
    order = torch.where(moved > 0, far, -1.0).topk(max(int(share * len(far)), 0))
    order = order.indices[order.values >= 0]
    order = order[moved[order].cumsum(0) <= trust**2 * W.square().sum()]
    picked = torch.zeros(len(far), dtype=torch.bool, device=W.device)
    picked[order] = True
    mask = picked[:, None].expand(-1, d).reshape(size[0], -1)[:, : size[1]]
    return quantizer.nearest(torch.where(mask, new, W), codes)
