"""ZO-SGD-Sign: a step of one length along each direction, downhill: only the sign of MeZO's slope counts."""

from __future__ import annotations

import math
from typing import ClassVar

from luthier.methods.estimators._base import FORWARD_ONLY
from luthier.methods.estimators.zeroth_order.mezo import MeZO
from luthier.registry import estimator


@estimator(
    paper="arXiv:2402.11592",
    row="zo-bench",
    provides=[FORWARD_ONLY],
    use_when="you use `mezo` and the sizes of its slopes differ widely, so that no learning rate suits them.",
    costs="as `mezo`.",
    starting_rate="with `sgd` about that of `mezo` times its usual slope; try powers of ten.",
    covers="steps along sign(slope) z, of length learning_rate |z|; with momentum, Adam or any other"
    " optimizer after it, as after `mezo`.",
    omits="the conservative form; forward gradients; blocks; the hybrid of zeroth and first order; the"
    " benchmark itself.",
    tests=[
        "methods/estimators/zeroth_order/test_zo_forms.py"
        "::test_a_step_along_the_sign_has_the_length_of_its_direction",
    ],
)
class ZOSign(MeZO):
    """sign(L(p + eps z) - L(p - eps z)) z, the mean over `n_probes` directions."""

    norm: ClassVar[str] = "the square root of the number of trainable parameters"

    def slope(self, above, below):
        return math.copysign(1.0, above - below) if above != below else 0.0
