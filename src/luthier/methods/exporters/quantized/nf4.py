"""nf4: linear weights in bitsandbytes' 4-bit NormalFloat with double quantization, the base of QLoRA.

Written by transformers through bitsandbytes, and expanded again by it when it is read back.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from luthier.methods.exporters._base import Exporter, Limits, Usage, in_transformers
from luthier.registry import exporter


@exporter(
    use_when="it is used, or tuned on, in transformers with bitsandbytes, on one GPU.",
    costs="4.127 bits a weight; reads no rows.",
    tests=["methods/exporters/quantized/test_nf4.py::test_a_checkpoint_is_bitsandbytes_own"],
)
class NF4(Exporter):
    """4-bit NormalFloat."""

    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    relation: ClassVar[str] = "quantized"
    package: ClassVar[str] = "bitsandbytes"
    generates: ClassVar[bool] = True

    def write(self, source, folder):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=source.precision,
        )
        model = AutoModelForCausalLM.from_pretrained(
            source.plain, dtype=source.precision, quantization_config=how
        )
        model.save_pretrained(folder)
        source.save_tokenizer(folder)

    def read(self, source, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
        return source.around(model, AutoTokenizer.from_pretrained(folder))

    def finish(self, source, folder):
        source.finish_configs(folder)

    def limits(self, source, folder):
        return Limits(weights=0.2)

    def usage(self, source, folder, place):
        tool = "transformers, with bitsandbytes installed"
        return [Usage(tool, in_transformers(place), "python"), Usage("vLLM", f"vllm serve {place}")]
