"""awq: linear weights in 4 bits, rounded after channels that carry large inputs were scaled up.

The scales are folded into what comes before (a norm, or the rows of `up_proj`), so that the result is plain
W4A16 of compressed-tensors and costs nothing when it is used. One exponent for each place, the one of 21 with
the least error of the outputs on the run's own rows, as in AWQ (arXiv:2306.00978). Departs from it: the root
mean square stands for the mean of magnitudes; no weights are clipped; `o_proj` is rounded as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.exporters.quantized._four_bits import FourBits
from luthier.model.linear import linear_modules
from luthier.model.loaded import load
from luthier.model.statistics import gather
from luthier.registry import build, exporter

EXPONENTS = 20  # steps between 0 and 1 that are tried
KINDS = ("llama", "mistral", "qwen2", "qwen3")  # networks whose norms and blocks are of this form
PLACES = (  # of a block: what comes before, and the modules that read it
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class Place:
    """Modules that read one input, and the module whose output it is."""

    before: Any
    readers: tuple[Any, ...]
    name: str  # of the first reader


@exporter(
    use_when="as `gptq`, in a tenth of its time; networks of the Llama, Mistral and Qwen kinds.",
    costs="4 bits a weight and 16 for each group; a pass over `init_rows` rows.",
    tests=["methods/exporters/quantized/test_compressed.py::test_codes_are_read_back"],
)
class AWQ(FourBits):
    """4-bit integers after scaling."""

    def check(self, source):
        super().check(source)
        kind = source.loaded.model.config.model_type
        if kind not in KINDS:
            raise RecipeError(
                f"export format 'awq' knows the blocks of {', '.join(KINDS)}, not of {kind}; use --as gptq"
            )

    @torch.no_grad()
    def reference(self, source):
        """The tuned model with the scales folded in: another plain network, with the same outputs."""
        folder = source.scratch / "scaled"
        if folder.is_dir():
            return folder
        plain, rows = load(source.plain, dtype="float32"), self.calibration(source)
        network: Any = plain.model
        names = list(linear_modules(network))
        size = self.group_size(plain, [name for name in names if ".layers." in name])
        settings = {"name": "rtn", "bits_per_weight": 4, "group_size": size, "symmetric": True}
        quantizer = build("quantizer", settings)
        for layer in range(network.config.num_hidden_layers):
            block = f"model.layers.{layer}."
            readers = {place.name: place.readers[0] for place in places(network, block)}
            statistics = gather("hessian", readers, rows, plain.roles)
            for place in places(network, block):
                fold(place, best_scale(place, statistics[place.name], quantizer))
        network.save_pretrained(folder)
        source.save_tokenizer(folder)
        return folder


def places(model: Any, block: str) -> Iterator[Place]:
    """The places of a block where scales can be folded in."""
    for before, readers in PLACES:
        modules = tuple(model.get_submodule(block + name) for name in readers)
        yield Place(model.get_submodule(block + before), modules, block + readers[0])


def best_scale(place: Place, H: Tensor, quantizer: Any) -> Tensor:
    """[in] the scales with which rounding changes the readers' outputs least. H [in, in]: the sum of x x' of
    their inputs.
    """
    rms = H.diagonal().sqrt().clamp(min=1e-6)
    best, least = torch.ones_like(rms), float("inf")
    for i in range(EXPONENTS + 1):
        scale = rms ** (i / EXPONENTS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for reader in place.readers:
            W = reader.weight.float()
            codes = quantizer.quantize(W * scale)
            E = quantizer.dequantize(codes, tuple(W.shape), torch.float32) / scale - W
            error += float(((E @ H) * E).sum())
        if error < least:
            best, least = scale, error
    return best


def fold(place: Place, scale: Tensor) -> None:
    """Multiply the readers' weights, and divide what they read. A norm has one weight for each channel, a
    linear module a row.
    """
    for reader in place.readers:
        reader.weight.mul_(scale)
    if place.before.weight.dim() == 1:
        place.before.weight.div_(scale)
        return
    place.before.weight.div_(scale[:, None])
    if place.before.bias is not None:
        place.before.bias.div_(scale)
