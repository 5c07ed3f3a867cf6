"""Adapters on disk: adapter_model.safetensors with adapter_config.json, as PEFT reads them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PromptTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor

from luthier.methods.tuners._peft.layer import ADAPTER
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network

# settings that adapter_config.json always spells out: every reader has known them for years
ALWAYS_WRITTEN = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "auto_mapping",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "target_modules",
    "modules_to_save",
    "fan_in_fan_out",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "num_virtual_tokens",
    "token_dim",
    "num_transformer_submodules",
    "num_attention_heads",
    "num_layers",
}


def write_adapter(folder: Path, state: dict[str, Tensor], config: PeftConfig, model: Network) -> None:
    """adapter_model.safetensors, read back and compared, and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    save_file(state, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    checkpoints.verify(state, folder / "adapter_model.safetensors")
    config.base_model_name_or_path = config.base_model_name_or_path or model.config._name_or_path or None
    made_for = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=made_for)
    _shorten(folder / "adapter_config.json", config)


def _shorten(path: Path, config: PeftConfig) -> None:
    """Leave out settings at their defaults that older readers (PEFT of last year, vLLM) may not know and
    would refuse. Types whose readers require them (OFT) are left as they are.
    """
    usual = {f.name: f.default for f in fields(config)}
    settings = json.loads(path.read_text(encoding="utf-8"))
    shortened = {
        k: v
        for k, v in settings.items()
        if k in ALWAYS_WRITTEN or k not in usual or v not in (usual[k], {}, [])
    }
    try:
        type(config).check_kwargs(**shortened)
    except ValueError:
        shortened = settings
    for key, value in shortened.items():
        if isinstance(getattr(config, key, None), (set, frozenset)):
            shortened[key] = sorted(value)  # PEFT lists a set, in another order in every process
    path.write_text(json.dumps(shortened, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prompt_config(vectors: Tensor, model: Network, seq2seq: bool = False) -> PromptTuningConfig:
    """What PEFT's type PROMPT_TUNING is to know of [n, width] vectors."""
    text = model.config.get_text_config()
    return PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        num_virtual_tokens=len(vectors),
        token_dim=vectors.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=text.num_attention_heads,
        num_layers=text.num_hidden_layers,
    )


def write_prompt(folder: Path, vectors: Tensor, model: Network, seq2seq: bool = False) -> None:
    """[n, width] vectors as an adapter of PEFT's type PROMPT_TUNING."""
    config = prompt_config(vectors, model, seq2seq)
    config.inference_mode = True
    write_adapter(folder, {"prompt_embeddings": vectors}, config, model)


def plain_state(model: Network) -> dict[str, Tensor]:
    """The weights of a merged model under the names they have without PEFT."""
    out = {}
    wrapped = {
        n: m for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    for name, value in model.state_dict().items():
        for n, m in reversed(wrapped.items()):  # the innermost first: wrappers of bare weights are nested
            if name.startswith(f"{n}."):
                keep = f"{n}.modules_to_save.{ADAPTER}."
                if isinstance(m, BaseTunerLayer):
                    keep = f"{n}.base_layer."
                elif isinstance(m, TrainableTokensWrapper):
                    keep = f"{n}.token_adapter."
                name = f"{n}.{name.removeprefix(keep)}" if name.startswith(keep) else ""
        if name:
            out[name] = value
    return out


def low_rank_factors(delta: Tensor, rank: int | None) -> tuple[tuple[Tensor, Tensor], float]:
    """[out, in] -> A [r, in], B [out, r], and the relative error left."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = max(1, int((S > S[0] * 1e-6).sum())) if rank is None else min(rank, len(S))
    left = float(S[r:].norm() / S.norm().clamp(min=1e-30))
    return (Vh[:r], U[:, :r] * S[:r]), left
