"""Full fine-tuning: all weights are trained."""

from __future__ import annotations

from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import tuner


@tuner(
    provides=[MERGE],
    use_when="memory allows it, you have many rows, or the task is far from what the model knows. It"
    " is the reference that all other tuners are compared with.",
    costs="gradients of all weights, and with AdamW two further numbers for each: about 16 bytes a"
    " parameter in fp32, before activations.",
    starting_rate="1e-5 to 2e-5 with AdamW for models of a billion parameters and more (TRL's default"
    " for SFT is 2e-5).",
    default_rate=2e-5,
)
class Full(Tuner):
    """All parameters are trained. The initial weights are not stored, so the tuner cannot be disabled: set
    another reference where an objective needs one.
    """

    def attach(self, model):
        return TunedWeights(self, model, lambda name, p: p.is_floating_point())
