"""merged: a plain transformers model, whatever it was tuned by.

Merged and compared in fp32 first, so that rounding cannot hide an adapter that was lost; then rounded once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from luthier.errors import Refused
from luthier.methods.exporters._base import Exporter, Limits, Usage, in_transformers
from luthier.model.loaded import Loaded, load
from luthier.registry import exporter

ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.1}  # nats that rounding the merged weights may change
LARGE = 0.5  # a share of what tuning changed: where rounding changes more, the export is refused


@exporter(
    use_when="another tool reads transformers folders, or the tuner is no LoRA: transformers, vLLM, TGI,"
    " SGLang and most converters do.",
    costs="as many bytes as the base model; the merge is done in fp32.",
)
class Merged(Exporter):
    """The tuned weights in the base model's form."""

    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def write(self, source, folder):
        source.write_plain(folder)
        if source.precision not in ROUNDING:
            return
        architecture = source.loaded.roles.policy.architecture
        rounded: Any = architecture.load(str(folder), dtype=source.precision)
        rounded.save_pretrained(folder)
        probe = source.probe
        change = probe.compare(load(folder, dtype="float32")).mean
        if source.dtype is None and probe.moved is not None and change > LARGE * probe.moved:
            raise Refused(
                f"in {str(source.precision).removeprefix('torch.')} the export would lose most of what tuning"
                f" changed: rounding changes log-probabilities by {change:.1e} on average, tuning by"
                f" {probe.moved:.1e}; add --dtype float32. Nothing was written"
            )

    def read(self, source, folder):
        return load(folder, dtype="float32")

    def finish(self, source, folder):
        source.finish_configs(folder)
        quantizer = source.loaded.recipe.methods()["quantization"]
        if quantizer is not None:
            source.notes.insert(0, requantized(source, folder, quantizer))

    def limits(self, source, folder):
        return Limits(logprobs=ROUNDING.get(source.precision))

    def usage(self, source, folder, place):
        auto_class = source.loaded.roles.policy.architecture.auto_class().__name__
        usage = [Usage("transformers", in_transformers(place, auto_class), "python")]
        if auto_class == "AutoModelForCausalLM":
            usage.append(Usage("vLLM", f"vllm serve {place}"))
        return usage


def requantized(source: Any, folder: Path, quantizer: Any) -> str:
    """What it costs to quantize the merged weights as the base was: the divergence from the tuned model,
    before and after.
    """
    if quantizer.reads:
        return (
            f"quantizer {quantizer.name} needs calibration rows, so the cost of requantizing was not measured"
        )
    loaded, rows = source.loaded, source.probe.rows
    settings = {"quantization": loaded.recipe.quantization, "architecture": loaded.recipe.architecture}
    merged = divergence(loaded, load(folder, dtype="float32"), rows)
    again = divergence(loaded, load(folder, dtype="float32", **settings), rows)
    return (
        f"merged into the dequantized {quantizer.name} weights: KL to the tuned model is {merged:.1e}"
        f" per token, and {again:.1e} if requantized to {quantizer.name}"
    )


@torch.no_grad()
def divergence(one: Loaded, other: Loaded, rows: list[dict]) -> float:
    """KL of the first model's next-token distribution to the second's, in nats, the mean over the rows'
    supervised tokens.
    """
    outputs = []
    for loaded in (one, other):
        loaded.roles.policy.eval()
        outputs.append(loaded.roles.policy.outputs(loaded.roles.batch(rows)))

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)

    return float(outputs[0].apply(kl, beside=outputs[1:]).mean())
