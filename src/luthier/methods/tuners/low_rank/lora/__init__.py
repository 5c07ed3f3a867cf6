"""LoRA: trains a low-rank update W + s B A, with s = lora_alpha / r and B zero at the start. Uses PEFT's own
layers, so its adapters load anywhere.

Variants by settings: rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), and the initialisations PiSSA
(arXiv:2404.02948), OLoRA (arXiv:2406.01775), orthogonal, and three computed from the first `init_rows` rows
(or those of `init_data`): EVA, CorDA (arXiv:2406.05223) and LoRA-GA (arXiv:2407.05000). CorDA preserves the
knowledge in `init_data` (kpm) or adapts to its task (ipm); ipm is ahead of LoRA where the task changes what
layers make of their main inputs, and was behind it in all three seeds of a new toy language, so try both.

Departs from PEFT for PiSSA, OLoRA, CorDA and LoRA-GA: the base weight is not modified; a second, frozen
adapter subtracts the initial value of the factors. So the tuned model starts as the base, disabling the
adapter gives the base bit for bit, and the saved adapter (rank 2r: [B, -B0] [A; A0]) loads on the original
base. Statistics are computed for a few layers at a time. LoRA-GA's factors are computed by PEFT; CorDA's are
the same sums (PEFT's module needs a package that PEFT does not install). EVA is computed without PEFT: the
second moments of a layer's input are collected in one pass, and their eigenvectors are the singular vectors
that PEFT's incremental SVD approximates, so there is no convergence criterion and no tau, and padding is not
counted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, FACTOR_B, LORA, LOW_RANK, MERGE
from luthier.methods.tuners._delta import TargetModules
from luthier.methods.tuners.low_rank.lora.starts import CHOICES, DRIVEN, STARTS
from luthier.registry import Range, did_you_mean, tuner


@tuner(
    example={"r": 2, "init_rows": 2},
    paper="arXiv:2106.09685",
    row="eva corda",
    provides=[DISABLE_ADAPTER, MERGE, LOW_RANK, LORA, FACTOR_B],
    use_when="you fine-tune a large model on one GPU and want the default that every tool can load. It"
    " is a good first choice for nearly any task.",
    costs="gradients and optimizer state of about 0.1 to 1 % of the parameters; merged, inference"
    " costs nothing more.",
    starting_rate="1e-4 to 2e-4 with AdamW (QLoRA's paper: 2e-4 up to 13B parameters, 1e-4 above).",
    default_rate=2e-4,
    covers={
        "eva": "A from the directions of what layers read, and ranks where these explain most.",
        "corda": "both modes, equal to PEFT's; ipm learns more than LoRA where the task changes what a layer"
        " makes of its main inputs, in three of three draws.",
    },
    omits={
        "eva": "PEFT's incremental SVD with its convergence criterion.",
        "corda": "a lower loss than LoRA with ipm on the toy language model: there it is higher in three of"
        " three seeds (claim corda_convergence). CorDA++, which chooses ranks.",
    },
    tests={
        "eva": [
            "methods/tuners/low_rank/test_lora_starts.py::test_eva_spans_what_layers_read",
            "methods/tuners/low_rank/test_lora_starts.py::test_eva_gives_ranks_to_layers_where_they_explain_most",
            "methods/tuners/low_rank/test_lora_starts.py::test_eva_agrees_with_peft",
        ],
        "corda": [
            "methods/tuners/low_rank/test_lora_starts.py::test_corda_agrees_with_peft",
            "methods/tuners/low_rank/test_lora_starts.py::test_corda_with_white_inputs_is_pissa",
            "methods/tuners/low_rank/test_lora_starts.py::"
            "test_corda_that_previews_the_task_learns_more_where_the_task_is_in_what_is_read",
        ],
    },
)
class LoRA(TargetModules):
    """Low-rank adaptation."""

    r: Annotated[int, Range(4, 64, log=True)] = 8  # rank of the update
    lora_alpha: float = 16  # scale of the update, before division by r (by its square root with use_rslora)
    lora_dropout: float = 0.0  # dropout on the input of A, drawn for each micro-batch
    use_rslora: bool = False  # divide lora_alpha by the square root of r
    use_dora: bool = False  # DoRA: the norm of each output's weights is trained separately from its direction
    # true (B = 0), gaussian, pissa, pissa_niter_16 (fast SVD), olora, orthogonal, lq, eva, corda, lora_ga
    init_lora_weights: bool | str = True
    # rho: ranks may grow to rho * r, their sum stays (1: all r); adjust_scaling_factors
    eva_config: dict[str, Any] | None = None
    # corda_method: ipm (adapt to the task) or kpm (preserve the knowledge in the rows)
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None  # direction, scale, stable_gamma
    init_rows: Annotated[int, Field(ge=1)] = 64  # rows for eva, corda and lora_ga
    init_data: Any = None  # source of these rows, as in a recipe's `data`; not given: the run's own
    bias: Literal["none", "all", "lora_only"] = "none"  # which biases are trained as well
    # ends of names of parameters, e.g. mlp.experts.down_proj: the fused experts of a MoE
    target_parameters: list[str] | None = None

    @property
    def active_provides(self):
        """With DoRA the update is more than B A."""
        return self.provides - {LOW_RANK, LORA} if self.use_dora else self.provides

    def __post_init__(self):
        start = self.init_lora_weights
        if self.r < 1:
            raise RecipeError(f"r: {self.r} must be at least 1")
        if isinstance(start, str) and not start.startswith("pissa_niter_") and start not in STARTS:
            why = (
                " needs the weights from before the base was quantized" if start == "loftq" else " is unknown"
            )
            raise RecipeError(
                f"init_lora_weights: '{start}'{why}; there is: true, {', '.join(STARTS)}, pissa_niter_N"
            )
        if start is False:
            raise RecipeError("init_lora_weights: false would not start at the base model")
        if self.subtracts and (self.use_dora or self.target_parameters):
            raise RecipeError(
                f"init_lora_weights: {start} cannot be combined with use_dora or target_parameters"
            )
        if start == "eva" and self.target_parameters:
            raise RecipeError("init_lora_weights: eva cannot be combined with target_parameters")
        for name, usual in DRIVEN.items():
            settings = getattr(self, f"{name}_config") or {}
            if settings and name != start:
                raise RecipeError(f"{name}_config is only used with init_lora_weights: {name}")
            for key, value in settings.items():
                if key not in usual:
                    raise RecipeError(f"{name}_config has no setting '{key}'{did_you_mean(key, usual)}")
                if key in CHOICES and value not in CHOICES[key]:
                    raise RecipeError(
                        f"{name}_config: {key} must be one of {', '.join(CHOICES[key])}, not {value!r}"
                    )
        if self.how.get("rho", 1) < 1:
            raise RecipeError("eva_config: rho must be at least 1")

    @property
    def subtracts(self):
        """Does the start of B A have to be taken away again?"""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(
            ("pissa", "olora", "lq", "corda", "lora_ga")
        )

    @property
    def how(self):
        """The settings of a start that is taken from data."""
        start = str(self.init_lora_weights)
        return {**DRIVEN[start], **(getattr(self, f"{start}_config") or {})} if start in DRIVEN else {}

    def attach(self, model):
        from luthier.methods.tuners.low_rank.lora.tuned import attach

        return attach(self, model)
