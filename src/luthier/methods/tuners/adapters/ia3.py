"""(IA)3: learned scales on the outputs of keys and values and on the inputs of the second feed-forward
matrix. Uses PEFT's own layers.

There is one number per channel, initially 1, so few that those of many tasks can be stored beside one model;
all fold into the weights. Unless modules are named, they are found by name in every layer, including
cross-attention: k and v (a fused q, k and v is scaled as one) and the last matrix of the feed-forward block.
PEFT's own lists use q instead of k in several families, and the attention output as well in BERT. A gated
feed-forward block is scaled after its gate. Departs from the paper: there is no length normalisation or
unlikelihood term; those are objectives.
"""

from __future__ import annotations

from typing import Any, ClassVar

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE, Tuner
from luthier.model.anatomy import part_names, part_pattern
from luthier.registry import tuner


@tuner(
    paper="arXiv:2205.05638",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you have few rows and many tasks: it trains one scale for each channel, a few hundred"
    " thousand numbers for a large model, and folds into the weights.",
    costs="the smallest optimizer state of the adapters; merged, inference costs nothing more.",
    starting_rate="far above LoRA's: 3e-3 with Adafactor in the paper.",
    default_rate=3e-3,
)
class IA3(Tuner):
    """Inhibit and amplify inner activations."""

    on_quantized: ClassVar[bool] = True

    # suffixes of module names, or one regular expression; not given: k, v and the last feed-forward matrix
    target_modules: str | list[str] | None = None
    # those of them whose input is scaled; not given: the last feed-forward matrix
    feedforward_modules: str | list[str] | None = None
    # suffixes of module names, or a regular expression, to leave unchanged
    exclude_modules: str | list[str] | None = None
    # further modules that are fully trained and saved beside the adapter
    modules_to_save: list[str] | None = None

    def attach(self, model):
        from luthier.methods.tuners._peft import PeftTunedModel, any_config, sideways

        inner, down = part_names(model, "k", "v", "qkv"), part_names(model, "down")
        if self.target_modules is None and not inner:
            raise RecipeError(
                "tuner 'ia3' does not know the key and value modules of"
                f" {type(model).__name__}; set target_modules and feedforward_modules"
            )
        settings: dict[str, Any] = {
            "target_modules": part_pattern(inner + down)
            if self.target_modules is None
            else self.target_modules,
            "feedforward_modules": (
                part_pattern(down) if self.feedforward_modules is None else self.feedforward_modules
            ),
            "exclude_modules": self.exclude_modules,
            "modules_to_save": self.modules_to_save,
            "fan_in_fan_out": sideways(model),
        }
        attached = PeftTunedModel(self, model, any_config("ia3", settings))
        if self.target_modules is None:
            attached.warnings += attached.experts_left_out("tuner 'ia3'")
        return attached
