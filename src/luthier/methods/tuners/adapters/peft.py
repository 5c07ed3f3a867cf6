"""Any tuner type of the PEFT library by its name, e.g. {name: peft, type: vera, config: {r: 256}}. Settings
and their defaults are PEFT's own, the modules that a type sits on among them; on a network that PEFT has no
modules for, it is all linear ones.

Vectors before the text (prompt_tuning, p_tuning, prefix_tuning) are put there by luthier's layouts and saved
as PEFT's. Types that need support from the trainer (AdaLoRA's allocator, X-LoRA, Poly) are refused with the
reason. Whether a type merges is tried, and a type that does not start as the base model says so.
docs/tuners.md lists every type, the methods of two surveys, and what is not available.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from luthier.methods.architectures._base import SOFT_PROMPTS
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
    covers="the adapters of the surveys by PEFT's own types, beside the tuners here.",
    omits="types that change PEFT's own forward pass.",
    tests=[
        "contracts/test_peft_types.py::test_a_type_from_a_run_to_an_export",
        "contracts/test_surveyed_tuners.py::test_named",
        "contracts/test_surveyed_tuners.py::test_counts_are_the_formulas",
    ],
)
class PEFT(Tuner):
    """PEFT's layers on a model; saved and loaded as PEFT does."""

    on_quantized: ClassVar[bool] = True

    type: str = "lora"  # PEFT's name of the method: lora, vera, ia3, boft, loha, hra, fourierft, ...
    # settings of PEFT's config class for it, with PEFT's defaults
    config: dict[str, Any] | None = None

    def __post_init__(self):
        self.peft_config  # noqa: B018  checked here, so that a recipe is refused before a model is loaded

    @cached_property
    def peft_config(self):
        from luthier.methods.tuners._peft import any_config

        return any_config(self.type, self.config or {})

    @property
    def active_requires(self):
        """Vectors before the text need a network that reads them."""
        if self.type.upper() in ("PROMPT_TUNING", "P_TUNING"):
            return frozenset({SOFT_PROMPTS})
        return self.requires

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
        from luthier.methods.tuners._peft import attach_type

        return attach_type(self, self.peft_config, model)
