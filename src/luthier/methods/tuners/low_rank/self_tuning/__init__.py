"""Self-tuning networks on adapters: LoRA whose factors are functions of two hyperparameters, A(h) = A +
rows(V_A h) A_hyper, and B likewise.

h is the change of the two since the start: the logit of the dropout on the input of A, and the log of the
adapter's weight decay. The factors learn the best response to them, and estimator `self_tuning` updates them
by the loss on validation rows. With any other estimator h stays 0 and this is LoRA. At the end of a run h is
a constant: merged and exported, the adapter is an ordinary weight update. r: 0 trains one dense matrix
instead of the factors. Departs from the paper: its networks are gated as a whole; and h is measured from its
initial value, so that V has no effect at the start.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.tuners._base import DISABLE_ADAPTER, FACTOR_B, MERGE
from luthier.methods.tuners._delta import Delta, frozen
from luthier.methods.tuners.low_rank.self_tuning.maths import HYPER, names, placed, rate, responses
from luthier.registry import Capability, tuner

HYPERPARAMETERS = Capability(
    "hyperparameters", says="a tuner whose factors depend on hyperparameters (`self_tuning`)"
)


@tuner(
    example={"r": 2},
    paper="arXiv:1903.03088",
    row="self-tuning-networks",
    provides=[DISABLE_ADAPTER, MERGE, HYPERPARAMETERS, FACTOR_B],
    use_when="dropout and weight decay of a LoRA are to be found within one run, from validation rows;"
    " use it with estimator `self_tuning`.",
    costs="about twice the parameters of a LoRA of the same rank.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
)
class SelfTuning(Delta):
    """LoRA whose factors depend on the current hyperparameters."""

    r: Annotated[int, Field(ge=0)] = 8  # rank of the update; 0: a dense matrix
    lora_alpha: float = 16  # scale of the update, before division by r
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1  # initial dropout
    weight_decay: Annotated[float, Field(gt=0)] = 1e-4  # initial weight decay of the adapter
    # initial spread in which responses are learned, in logits and logs
    sigma: Annotated[float, Field(gt=0)] = 0.5

    def attach(self, model):
        from luthier.methods.tuners.low_rank.self_tuning.tuned import SelfTuningModel

        return SelfTuningModel(self, model)

    def init(self, W):
        tensors: dict[str, Any] = {
            "dial": frozen(torch.zeros(len(HYPER))),
            "dropping": ("seeded", torch.zeros(())),
        }
        shapes = {"A": (self.r, W.shape[1]), "B": (W.shape[0], self.r)} if self.r else {"D": tuple(W.shape)}
        for name, shape in shapes.items():
            start = torch.zeros(shape)
            tensors[name] = nn.init.kaiming_uniform_(start, a=5**0.5) if name == "A" else start
            tensors[f"{name}_hyper"], tensors[f"V_{name}"] = (
                torch.zeros(shape),
                torch.randn(shape[0], len(HYPER)),
            )
        return tensors

    def change(self, p: Any) -> tuple[Tensor, ...]:
        """The factors as they answer now, scaled."""
        factors = responses(p)
        return (factors[0], factors[1] * (self.lora_alpha / self.r)) if self.r else factors

    def weight(self, W, p):
        factors = self.change(p)
        return W + (factors[1] @ factors[0] if self.r else factors[0]).to(W.dtype)

    def forward(self, x, y, p, layer):
        dial = placed(p.dial, x)
        if torch.is_grad_enabled() and float(p.dropping):
            keep = 1 - rate(self, dial.detach())[..., None]
            x = x * (torch.rand_like(x) < keep) / keep
        for n in names(p):
            x = F.linear(x, getattr(p, n)) + dial @ getattr(p, f"V_{n}").T * F.linear(
                x, getattr(p, f"{n}_hyper")
            )
        return y + (x * (self.lora_alpha / self.r) if self.r else x)

    def factors(self, p):
        factors = self.change(p)
        return (factors[0], factors[1]) if self.r else None
