"""Full fine-tuning: every weight moves."""

from __future__ import annotations

from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import tuner


@tuner(provides=[MERGE])
class Full(Tuner):
    """All parameters. The start is not kept, so it cannot be switched off: give another reference where one
    is wanted.
    """

    def attach(self, model):
        return TunedWeights(self, model, lambda name, p: p.is_floating_point())
