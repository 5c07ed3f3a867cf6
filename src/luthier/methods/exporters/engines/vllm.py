"""vllm: what `vllm serve` takes: a LoRA adapter where vLLM reads all of it, else the merged model.

vLLM's constraints are those of its PEFT reader: one LoRA without DoRA, biases and whole modules, of rank 512
at most, on linear layers inside the blocks. Why a run is merged is told.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from luthier.errors import RecipeError
from luthier.methods.exporters._base import Exporter, Usage
from luthier.registry import build, exporter
from luthier.storage import files

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
HEADS = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")  # outside of the blocks
# settings of an adapter that vLLM refuses, and how they are told
REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside it (modules_to_save)",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activation tokens (aLoRA)",
    "lora_bias": "biases of LoRA",
    "target_parameters": "parameters of experts",
}


@exporter(
    use_when="many users are answered at once, on GPUs; several adapters may share one base model.",
    costs="an adapter is megabytes; a merged model as many bytes as the base.",
    tests=["methods/exporters/engines/test_vllm.py::test_what_vllm_does_not_read_is_merged"],
)
class VLLM(Exporter):
    """An adapter, or a merged model, and the command that serves it."""

    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    generates: ClassVar[bool] = True

    merge: bool = False  # merge even where vLLM reads the adapter: it is faster, and serves nothing else

    def write(self, source, folder):
        reason = self.reason(source)
        if reason is None:
            try:
                build("exporter", "lora").write(source, folder)
                reason = unreadable(files.read_object(folder / "adapter_config.json"))
            except RecipeError as error:
                reason = str(error).partition(";")[0]
            if reason is None:
                return
            shutil.rmtree(folder)
            folder.mkdir()
        source.notes.append(f"merged: {reason}")
        build("exporter", "merged").write(source, folder)

    def reason(self, source: Any) -> str | None:
        """Why there is no adapter to begin with."""
        if self.merge:
            return "as the setting merge says"
        if source.dtype is not None:
            return f"--dtype {source.dtype} is the precision of whole models"
        if source.loaded.recipe.quantization is not None:
            return "the adapter belongs to a quantized base, which vLLM would load in another form"
        try:
            build("exporter", "lora").check(source)
        except RecipeError as error:
            return str(error).partition(";")[0]
        return None

    def part(self, folder: Path) -> Exporter:
        """The form that was written."""
        return build("exporter", "lora" if (folder / "adapter_config.json").is_file() else "merged")

    def read(self, source, folder):
        return self.part(folder).read(source, folder)

    def finish(self, source, folder):
        self.part(folder).finish(source, folder)

    def limits(self, source, folder):
        return self.part(folder).limits(source, folder)

    def usage(self, source, folder, place):
        path = folder / "adapter_config.json"
        if not path.is_file():
            return [Usage("vLLM", f"vllm serve {place}")]
        rank = smallest_rank(files.read_object(path))
        name, base = source.folder.resolve().name, source.loaded.recipe.model
        command = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}"
        return [Usage("vLLM", command)]


def rank_of(config: dict[str, Any]) -> int:
    """The largest rank of an adapter."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def smallest_rank(config: dict[str, Any]) -> int:
    """The smallest value of --max-lora-rank that holds an adapter."""
    return next(rank for rank in RANKS if rank >= rank_of(config))


def unreadable(config: dict[str, Any]) -> str | None:
    """Why vLLM would not read all of an adapter, by its adapter_config.json; None where it reads it."""
    if config.get("peft_type") != "LORA":
        return f"vLLM reads LoRA adapters, and this is {config.get('peft_type')}"
    for key, words in REFUSED.items():
        if config.get(key):
            return f"vLLM does not read adapters with {words}"
    if config.get("bias", "none") != "none":
        return "vLLM does not read adapters with trained biases"
    if rank_of(config) > RANKS[-1]:
        return f"vLLM reads adapters of rank {RANKS[-1]} at most, and this one has {rank_of(config)}"
    targets = config.get("target_modules") or []
    for name in [targets] if isinstance(targets, str) else targets:
        if name.rpartition(".")[2] in HEADS:
            return f"vLLM does not read LoRA on {name.rpartition('.')[2]}"
    return None
