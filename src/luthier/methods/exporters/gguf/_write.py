"""A plain transformers folder -> a GGUF file, through the `gguf` package, and the way back.

ARCHITECTURES has the networks whose weights and settings are written here; names of tensors are the
package's own table's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.errors import RecipeError

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Network:
    """How a kind of network is stored. name: of its architecture in GGUF. convert: changes a weight on its
    way, by its name and the config.
    """

    name: str
    convert: Callable[[str, torch.Tensor, Any], torch.Tensor]


def as_it_is(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    return weight


def interleaved(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp turns neighbours of a head by one angle, transformers its two halves: queries' and keys' rows
    change places.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def norms_plus_one(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Gemma multiplies by 1 + the weight of a norm, llama.cpp by the weight."""
    return weight + 1 if name.endswith("norm.weight") else weight


ARCHITECTURES = {  # model_type of a config -> how it is stored
    "llama": Network("llama", interleaved),
    "mistral": Network("llama", interleaved),
    "qwen2": Network("qwen2", as_it_is),
    "qwen3": Network("qwen3", as_it_is),
    "gemma2": Network("gemma2", norms_plus_one),
}


def check_config(config: Any) -> None:
    """Raises RecipeError for a network that is not written here."""
    advice = "set LLAMA_CPP to a copy of llama.cpp, whose convert_hf_to_gguf.py knows more"
    if config.model_type not in ARCHITECTURES:
        ours = ", ".join(ARCHITECTURES)
        raise RecipeError(
            f"model type {config.model_type} is none of those that luthier writes to GGUF itself ({ours});"
            f" {advice}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise RecipeError(
            f"luthier writes no GGUF of networks with scaled positions ({rope['rope_type']}); {advice}"
        )


def write(folder: Path, path: Path, kind: str, name: str, add_tokenizer: Callable[[Any, int], None]) -> None:
    """Write a GGUF file.

    folder: the plain network, in fp32. kind: of the matrices: f32, f16, bf16 or q8_0; vectors are f32.
    add_tokenizer: called with the writer and the number of rows of the embedding.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    check_config(config)
    network = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, network.name)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, config)
    architectures = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(architectures[network.name], config.num_hidden_layers)
    size = 0
    for key, weight in tensors(folder):
        target = table.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise RecipeError(f"{key} has no place in a GGUF of architecture {network.name}")
        if target == "token_embd.weight":
            size = len(weight)
        stored = network.convert(key, weight.float(), config).contiguous().numpy()
        quantization = quantization_of(stored, kind)
        writer.add_tensor(target, gguf.quants.quantize(stored, quantization), raw_dtype=quantization)
    add_tokenizer(writer, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def quantization_of(weight: np.ndarray, kind: str) -> Any:
    """How a weight is stored: vectors as they are, matrices whose rows are no whole blocks in 16 bits."""
    import gguf

    if weight.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    if weight.shape[-1] % block:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def add_settings(writer: Any, config: Any) -> None:
    """What llama.cpp must know of a network beside its weights."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def read(path: Path) -> Any:
    """The network in a GGUF file as transformers reads it, in fp32, with the size of a head as the file has
    it (transformers takes its own default for some kinds).
    """
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    size = reader.get_field(f"{architecture}.attention.key_length")
    if size is not None:
        config.head_dim = size.contents()
    how = {"gguf_file": path.name, "config": config, "dtype": torch.float32}
    with redirect_stderr(StringIO()):  # transformers has a progress bar here that nothing turns off
        return AutoModelForCausalLM.from_pretrained(path.parent, **how)


def tensors(folder: Path) -> Tensors:
    """Every tensor of a plain folder, one at a time."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)
