"""LoRA: W + s B A with B zero at the start, s = lora_alpha / r. PEFT's own layers, so its adapters are everyone's.

Variants by settings: rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), and the starts PiSSA (arXiv:2404.02948),
OLoRA (arXiv:2406.01775) and orthogonal. Departs from PEFT for PiSSA and OLoRA: the base weight is left alone, and what
the factors start with is subtracted by a second, frozen adapter. So the tuned model starts as the base, switching off
gives the base bit for bit, and the saved adapter (rank 2r: [B, -B0] [A; A0]) loads on the original base.
"""

from __future__ import annotations

from typing import Annotated, Literal

from luthier.method import Range, RecipeError, tuner
from luthier.tuners._delta import Where

STARTS = ("gaussian", "pissa", "olora", "orthogonal", "lq")
DRIVEN = {  # starts of PEFT that want more than the weights
    "eva": "the inputs of every layer on the data",
    "corda": "covariances of the inputs of every layer",
    "lora_ga": "gradients of the loss",
    "loftq": "a quantized base",
}


@tuner(paper="arXiv:2106.09685", gives="off merge low-rank")
class LoRA(Where):
    """Low-rank adaptation."""

    r: Annotated[int, Range(4, 64, log=True)] = 8  # rank of the update
    lora_alpha: float = 16  # scale of the update, before division by r (by its root with use_rslora)
    lora_dropout: float = 0.0  # dropout on what A reads
    use_rslora: bool = False  # divide lora_alpha by the root of r
    use_dora: bool = False  # DoRA: the norm of each output's weights is trained apart from its direction
    init_lora_weights: bool | str = True  # true (B = 0), gaussian, pissa, pissa_niter_16 (fast SVD), olora, orthogonal, lq
    bias: Literal["none", "all", "lora_only"] = "none"  # which biases train as well
    target_parameters: list[str] | None = None  # ends of names of bare weights, e.g. mlp.experts.down_proj: the fused experts of a MoE

    @property
    def provides(self):
        """With DoRA the update is more than B A."""
        return self.gives - {"low-rank"} if self.use_dora else self.gives

    def __post_init__(self):
        start = self.init_lora_weights
        if self.r < 1:
            raise RecipeError(f"r: {self.r} is not a rank")
        if isinstance(start, str) and not start.startswith("pissa_niter_") and start not in STARTS:
            why = f" wants {DRIVEN[start]}, which this tuner does not gather" if start in DRIVEN else " is unknown"
            raise RecipeError(f"init_lora_weights: '{start}'{why}; there is: true, {', '.join(STARTS)}, pissa_niter_N")
        if start is False:
            raise RecipeError("init_lora_weights: false would start from another model than the base")
        if self.subtracts and (self.use_dora or self.target_parameters):
            raise RecipeError(f"init_lora_weights: {start} does not go with use_dora or target_parameters")

    @property
    def subtracts(self):
        """Does the start of B A have to be taken away again?"""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora", "lq"))

    def attach(self, model):
        from luthier.tuners._peft_lora import attach

        return attach(self, model)
