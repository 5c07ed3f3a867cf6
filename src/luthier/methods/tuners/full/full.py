"""Full fine-tuning: all weights are trained."""

from __future__ import annotations

from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import tuner


@tuner(provides=[MERGE])
class Full(Tuner):
    """All parameters are trained. The initial weights are not kept, so the tuner cannot be switched off: name
    another reference where an objective needs one.
    """

    def attach(self, model):
        return TunedWeights(self, model, lambda name, p: p.is_floating_point())
