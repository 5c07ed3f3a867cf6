"""Checkpoints in the form of the package compressed-tensors, which vLLM, SGLang and transformers read: what
its exporters share.

The package packs the codes and describes them in config.json; where a weight's scales lie is decided here and
by luthier's quantizers. The head and everything that is no linear module stay in floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.exporters._base import Exporter, Limits, Usage, in_transformers
from luthier.methods.quantizers._base import Quantizer
from luthier.model.linear import linear_modules, oriented
from luthier.model.loaded import Loaded, load
from luthier.model.quantized_load import chosen
from luthier.registry import family
from luthier.storage import files

Scaled = tuple[Tensor, Tensor]  # a weight [out, in] and its scales [out, groups]


@family
class CompressedTensors(Exporter):
    """Family: linear weights as codes with scales, packed by compressed-tensors."""

    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16")
    relation: ClassVar[str] = "quantized"
    package: ClassVar[str] = "compressed-tensors"
    generates: ClassVar[bool] = True
    scheme: ClassVar[str] = ""  # as the package calls it
    rounding: ClassVar[float] = 0.0  # the largest share of a weight that is lost

    skip_modules: list[str] | None = None  # ends of names of modules that stay in floats, besides the head

    def scaled(
        self, source: Any, plain: Loaded, names: list[str], dtype: torch.dtype
    ) -> Iterator[tuple[str, Scaled]]:
        """Each of these modules' weight, on the points that its codes can hold or near them, and its scales
        in dtype. plain: the tuned model, merged, in fp32.
        """
        raise NotImplementedError

    def group_size(self, plain: Loaded, names: list[str]) -> int | None:
        """How many weights of a row share a scale; None for all of them."""
        return None

    @torch.no_grad()
    def write(self, source, folder):
        from compressed_tensors.compressors import BaseCompressor
        from huggingface_hub import save_torch_state_dict

        dtype = source.precision
        if dtype == torch.float32:
            dtype = torch.bfloat16  # which holds what fp32 holds; kernels for codes compute in 16 bits
        plain = load(self.reference(source), dtype="float32")
        names = chosen(plain.model, Quantizer(skip_modules=self.skip_modules))
        ignored = sorted(linear_modules(plain.model).keys() - set(names))
        description = self.describe(ignored, self.group_size(plain, names))
        scheme = description.config_groups["group_0"]
        compressor = BaseCompressor.get_value_from_registry(description.format)
        packed: dict[str, Tensor] = {}
        for name, (weight, scale) in self.scaled(source, plain, names, dtype):
            fields = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
            for field, value in fields.items():
                packed[f"{name}.{field}"] = value.contiguous().cpu()
        state: dict[str, Tensor] = {}
        for key, value in plain.model.state_dict().items():
            name, _, slot = key.rpartition(".")
            if name in names and slot != "bias":  # stands in the codes
                continue
            state[key] = value.to(dtype) if value.is_floating_point() else value
        tied = getattr(plain.model, "all_tied_weights_keys", None) or {}
        for key in tied:
            state.pop(key, None)
        save_torch_state_dict({**state, **packed}, folder, metadata={"format": "pt"})
        config = files.read_object(source.plain / "config.json")
        config["dtype"] = str(dtype).removeprefix("torch.")
        config["quantization_config"] = description.model_dump(mode="json")
        files.write_json(folder / "config.json", config)
        source.save_tokenizer(folder)

    def describe(self, ignored: list[str], group_size: int | None) -> Any:
        """What stands in config.json for those who read the codes."""
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            preset_name_to_scheme,
        )

        scheme = preset_name_to_scheme(self.scheme, ["Linear"])
        if group_size is not None:
            scheme.weights.group_size = group_size
        form = infer_module_format(torch.nn.Linear, scheme)
        return QuantizationConfig(
            config_groups={"group_0": scheme},
            format=form.value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=ignored,
        )

    def read(self, source, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

        how = {"dtype": torch.float32, "quantization_config": CompressedTensorsConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        return source.around(model, AutoTokenizer.from_pretrained(folder))

    def finish(self, source, folder):
        source.finish_configs(folder)

    def limits(self, source, folder):
        return Limits(weights=self.rounding)

    def usage(self, source, folder, place):
        tool = "transformers, with compressed-tensors installed"
        return [Usage("vLLM", f"vllm serve {place}"), Usage(tool, in_transformers(place), "python")]


def rows_scaled(weight: Tensor, largest: float, dtype: torch.dtype) -> Scaled:
    """A weight [out, in] and a scale for each row [out, 1], with which its largest number is `largest`."""
    scale = weight.abs().amax(1, keepdim=True) / largest
    return weight, scale.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def common_group(plain: Loaded, names: list[str], sizes: tuple[int, ...] = (128, 64, 32)) -> int:
    """The largest of these sizes that divides the inputs of every module. Raises RecipeError where none
    does.
    """
    modules = linear_modules(plain.model)
    inputs = {oriented(modules[name]).shape[1] for name in names}
    for size in sizes:
        if not any(count % size for count in inputs):
            return size
    raise RecipeError(
        f"no group of {', '.join(map(str, sizes))} weights divides the inputs of all layers"
        f" ({', '.join(map(str, sorted(inputs)))}); set groups, or use --as int8, which has a scale for"
        " each row"
    )
