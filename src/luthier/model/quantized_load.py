"""Reading a checkpoint into codes: transformers hands over one weight at a time, and it is quantized before
the next is read.

The only file that knows transformers' interface for quantizers. Weights are quantized from their values in
the checkpoint, in fp32, whatever the compute dtype is: so a base that is loaded again in another precision
has the same codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.compat.malloc import Mapped
from luthier.compat.transformers import add_entry
from luthier.errors import RecipeError
from luthier.methods.quantizers._base import Codes, Quantizer
from luthier.model.experts import Experts, Matrix, apart, fused, put
from luthier.model.quantized_linear import Quantized, plain, quantized_module
from luthier.registry import did_you_mean
from luthier.storage import checkpoints

Saved = dict[str, tuple[Quantizer, Codes]]  # module -> its quantizer and its codes


class Config(QuantizationConfigMixin):
    """What `from_pretrained` is given."""

    quant_method: Any = "luthier"

    def __init__(
        self, quantizer: Quantizer, dtype: torch.dtype, device: torch.device, saved: Saved | None = None
    ):
        self.quantizer, self.dtype, self.device, self.saved = quantizer, dtype, device, saved
        self.files = Mapped()  # what the checkpoint lies in
        self.read = 0  # bytes of it since pages were let go
        self.codes_of: Saved = {}  # until all is read: transformers empties buffers at its end

    def __deepcopy__(self, memo):
        return self  # transformers copies what it is given, codes included

    def to_dict(self):
        return {"quant_method": "luthier", "quantizer": self.quantizer.name}


class Loader(HfQuantizer):
    """Linear modules hold codes; everything else is read in the compute dtype."""

    quantization_config: Config

    def update_device_map(self, device_map):
        device = self.quantization_config.device
        if device_map is None and device.type == "cuda":
            return {"": device}
        return device_map

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        whole = {n: dict(m.named_parameters()) for n, m in fused(model).items()}
        split = apart(model)
        for name in chosen(model, config.quantizer):
            if config.saved is not None and name not in config.saved:
                continue
            put(model, name, quantized_module(model.get_submodule(name), config.dtype))
        for name, experts in split.items():  # the checkpoint knows them as one
            matrices = [m for m in experts.modules() if isinstance(m, Matrix)]
            if not any(isinstance(m, Quantized) for m in matrices):
                experts.base[0]._parameters.update(whole[name])
                put(model, name, experts.base[0])
                continue
            for m in matrices:
                m._parameters.pop("weight")
            for slot, p in whole[name].items():
                experts.register_parameter(slot, p)
        strict = [*(model._keep_in_fp32_modules_strict or ())]
        if config.dtype == torch.float16:
            strict += model._keep_in_fp32_modules or ()
        for name, p in model.named_parameters():  # the others are read in the dtype that they have here
            if p.is_floating_point() and not any(f".{k}." in f".{name}" for k in strict):
                p.data = p.data.to(config.dtype)

    def param_needs_quantization(self, model, param_name, **kwargs):
        name, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(name)
        return isinstance(module, Experts) or (leaf == "weight" and isinstance(module, Quantized))

    def get_quantize_ops(self):
        return Quantize(self)

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return True


class Quantize(ConversionOps):
    """One weight of the checkpoint -> the codes of its module. Nothing is left for transformers to set."""

    def __init__(self, loader: Loader):
        self.loader = loader

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        for key, value in input_dict.items():
            if isinstance(value, list):
                value = value[0]
            name, _, slot = key.rpartition(".")
            module: Any = model.get_submodule(name)
            there = getattr(module, slot).shape
            if tuple(value.shape) != tuple(there):
                raise RecipeError(
                    f"{name} has shape {tuple(value.shape)} in the checkpoint but {tuple(there)} in the model"
                )
            if isinstance(module, Experts):
                for e, W in enumerate(value):
                    self.take(f"{name}.{e}.{slot}", module.get_submodule(f"{e}.{slot}"), W)
            else:
                self.take(name, module, value)
            module._parameters[slot] = nn.Parameter(value.new_empty(0), requires_grad=False)
            module.__dict__["_is_hf_initialized"] = True
            missing_keys.discard(key)
        return {}

    def take(self, name: str, module: Any, W: Tensor) -> None:
        """The codes of one weight, as its module lays it out."""
        config = self.loader.quantization_config
        config.read += W.nbytes
        if config.read > checkpoints.WINDOW:
            config.files.drop()
            config.read = 0
        if not isinstance(module, Quantized):
            module._parameters["weight"] = nn.Parameter(W.to(config.dtype, copy=True), requires_grad=False)
        elif config.saved is None:
            dense = module.laid_out(W).float().contiguous()
            config.codes_of[name] = config.quantizer, config.quantizer.quantize(dense)
        else:
            own, codes = config.saved[name]
            config.codes_of[name] = own, {k: v.to(W.device) for k, v in codes.items()}


def chosen(model: Any, quantizer: Quantizer) -> list[str]:
    """The linear modules of a network that are quantized: all but its head, what is tied, and what is to be
    skipped.
    """
    names = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D, Matrix)]
    skip = set(get_keys_to_not_convert(model))
    skip |= {n for n in names if n.endswith(("classifier", "score", "qa_outputs"))}
    for end in quantizer.skip_modules or ():
        matches = {n for n in names if n == end or n.endswith(f".{end}") or f".{end}." in f".{n}."}
        if not matches:
            ends = {n.rpartition(".")[2] for n in names}
            raise RecipeError(
                f"quantization: skip_modules '{end}' matches no linear module{did_you_mean(end, ends)}"
            )
        skip |= matches
    quantized = [n for n in names if n not in skip]
    if not quantized:
        raise RecipeError(f"quantization: {type(model).__name__} has no linear modules to quantize")
    return quantized


def loaded(
    load: Any, quantizer: Quantizer, dtype: torch.dtype, device: torch.device, saved: Saved | None = None
) -> Any:
    """load(**kwargs of from_pretrained) -> the network with its linear weights as codes."""
    # transformers reads a checkpoint into codes, for as long as a run lasts
    add_entry(AUTO_QUANTIZATION_CONFIG_MAPPING, "luthier", Config)
    add_entry(AUTO_QUANTIZER_MAPPING, "luthier", Loader)
    config = Config(quantizer, dtype, device, saved)
    model = load(quantization_config=config, dtype=torch.float32)
    # what stays dense is read again when it is used: the rest of its file would count as memory for good
    config.files.drop()
    for name in list(config.codes_of):
        model.get_submodule(name).take(*config.codes_of.pop(name))
    for m in model.modules():
        if isinstance(m, Experts):
            for slot, p in list(m._parameters.items()):
                m._parameters.pop(slot)
                if p is None:  # nothing is left of what a checkpoint held
                    continue
                for e, W in enumerate(p):
                    weight = nn.Parameter(W.detach(), requires_grad=False)
                    m.get_submodule(f"{e}.{slot}")._parameters["weight"] = weight
    model.hf_quantizer.remove_quantization_config(model)  # to transformers it is a network like any other
    for m in model.modules():
        if hasattr(m, "config"):
            m.config.__dict__.pop("_is_quantized", None)
            m.config.dtype = dtype
    for name, m in list(model.named_modules()):  # what no checkpoint held stays dense
        if isinstance(m, Quantized) and "weight" in m._parameters:
            put(model, name, plain(m))
    return model
