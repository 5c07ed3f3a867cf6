"""LoRA+: a higher learning rate for factor B of a low-rank update, which starts at zero, than for factor A.

Place it after the transforms that rescale (adam), which would undo it. `learning_rate` is A's, and that of
parameters without factors. Departs from PEFT's optimizer, which has a separate rate for embeddings.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.transforms._base import Transform
from luthier.methods.tuners._base import FACTOR_B
from luthier.registry import Range, transform


@transform(
    requires=[FACTOR_B],
    paper="arXiv:2402.12354",
    use_when="a LoRA learns slowly: B gets a higher rate than A.",
    costs="nothing.",
    starting_rate="it is A's: start below that of `lora`, since B takes `loraplus_lr_ratio` times as much.",
    rate_factor=0.5,
)
class LoraPlus(Transform):
    """update of B * loraplus_lr_ratio."""

    pointwise = True

    # learning rate of B divided by that of A
    loraplus_lr_ratio: Annotated[float, Field(gt=0), Range(1, 32, log=True)] = 16.0

    def bind(self, attached):
        if not any("B" in group.params for group in attached.all_param_groups()):
            raise RecipeError(
                "transform 'lora_plus' finds no LoRA factor B; use it with tuner lora or a variant of it"
            )
        return self

    def apply(self, grads, state, group, step):
        return {slot: g * self.loraplus_lr_ratio if slot == "B" else g for slot, g in grads.items()}
