"""f-DPO: DPO with an f-divergence to the reference other than the reverse KL.

The implicit reward is beta * f'(policy / reference), with f' the derivative of the divergence's generator.
"""

import math
from typing import Literal

import torch.nn.functional as F

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference.dpo import DPO
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective

DERIVATIVES = {  # f'(t) of t = exp(u), up to a constant; a: f_alpha_divergence_coef
    "reverse_kl": lambda u, a: u,
    "forward_kl": lambda u, a: 1 - (-u).exp(),
    "js_divergence": lambda u, a: math.log(2) + F.logsigmoid(u),
    "alpha_divergence": lambda u, a: (
        u if abs(a - 1) < 1e-6 else ((a - 1) * u).clamp(max=80).expm1() / (a - 1)
    ),
}


@objective(
    paper="arXiv:2309.16240",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="DPO under its reverse KL makes answers too uniform: other divergences keep more diversity.",
    rate_factor=0.05,
)
class FDPO(DPO):
    """-log sigmoid(beta * (f'(ratio of the best) - f'(ratio of the worst)))."""

    # reverse_kl is DPO
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "js_divergence"
    )
    # alpha of alpha_divergence: towards 1 the reverse KL, towards 0 the forward KL
    f_alpha_divergence_coef: float = 0.5

    def values(self, roles, batch):
        return DERIVATIVES[self.f_divergence_type](super().values(roles, batch), self.f_alpha_divergence_coef)
