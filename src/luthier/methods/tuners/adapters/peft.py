"""Any layer type of the PEFT library by its name, e.g. {name: peft, type: vera, config: {r: 256}}. Settings
are PEFT's own.

Types that put vectors before the text (prompt, prefix and p-tuning) need PEFT's own forward, which packed
batches do not use, and are refused; so are types that need support from the trainer (AdaLoRA's allocator,
X-LoRA, Poly). docs/tuners.md lists the methods of two surveys: these types, luthier's own, and what is not
available.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, ClassVar

from luthier.methods.tuners._base import DISABLE_ADAPTER, FACTOR_B, LORA, LOW_RANK, MERGE, Tuner
from luthier.registry import tuner


@tuner(
    row="peft-survey peft-fm-survey",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you need an adapter type of the PEFT library that has no file of its own here, such as"
    " VeRA, BOFT, LoHa or FourierFT.",
    costs="that of the PEFT type.",
    starting_rate="that of the PEFT type; its recipe here (`vera`) takes 0.01 on a toy model.",
    default_rate=2e-4,
)
class PEFT(Tuner):
    """PEFT's layers on a model; saved and loaded as PEFT does."""

    on_quantized: ClassVar[bool] = True

    type: str = "lora"  # PEFT's name of the method: lora, vera, ia3, boft, loha, hra, fourierft, ...
    # settings of PEFT's config class for it; target_modules is all-linear unless given
    config: dict[str, Any] | None = None

    def __post_init__(self):
        self.peft_config  # noqa: B018  checked here, so that a recipe is refused before a model is loaded

    @cached_property
    def peft_config(self):
        from luthier.methods.tuners._peft import any_config

        return any_config(self.type, self.config or {})

    @property
    def active_provides(self):
        """Some types cannot be merged; LoRA without DoRA is made of A and B."""
        from luthier.methods.tuners._peft import merges

        out = {DISABLE_ADAPTER}
        if merges(self.peft_config):
            out.add(MERGE)
        if self.type.lower() == "lora":
            out.add(FACTOR_B)
            if not (self.config or {}).get("use_dora"):
                out |= {LOW_RANK, LORA}
        return frozenset(out)

    def attach(self, model):
        from luthier.methods.tuners._peft import PeftTunedModel

        config = copy.deepcopy(self.peft_config)
        fresh = getattr(model, "fresh", ())
        if fresh and hasattr(config, "modules_to_save"):  # a new head is trained along
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *fresh})
        return PeftTunedModel(self, model, config)
