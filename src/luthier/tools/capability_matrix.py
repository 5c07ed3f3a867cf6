"""What every tuner can do, tested on tiny networks, and its trainable share of a Llama of 7 billion weights.

`luthier methods --kind tuner --wide` prints it. A yes is something that was done and compared just now: the
merged network answered like the tuned one, the exported LoRA loaded in PEFT and answered alike, and so on.
Settings are the defaults, made small where a tiny network needs it. The share that moves is counted on
weights that take no memory (torch's meta device): on all 32 layers for tuners of own weights, on one and two
layers and from there for those that repeat by layer.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LABEL_HEAD
from luthier.registry import build, classes, find

WIDE = ("name", "paper", "share", "merge", "off", "lora", "quantized", "tied", "experts")
IDS = torch.arange(3, 17).reshape(2, 7)
SEVEN: dict[str, Any] = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
)
DEPTH = 32
# what stands for texts where a network has no tokenizer
TEXTLESS = {"descriptions": {"LABEL_0": [3, 20], "LABEL_1": [4, 21]}}


def tuners() -> list[dict[str, Any]]:
    """A row for each tuner: yes, no, or under which setting; the trainable share of a Llama-7B in percent."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    names = [cls.name for cls in classes("tuner")]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PEFT, about tied weights and missing masks
        meta = _llama(DEPTH, "meta", **SEVEN)
        table = []
        for name in names:
            row = {"name": name, "paper": find("tuner", name).paper or ""}
            row |= _abilities(name)
            row["share"] = _share(name, meta)
            table.append(row)
        return table


def _llama(layers: int, device: str = "cpu", **shape: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    small: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**{**small, **shape}, num_hidden_layers=layers)).eval()


def _biased() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=4, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=1
        )
    ).eval()


def _labels() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = _llama(4).config.to_dict() | {"num_labels": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**config)).eval()


def _experts() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=2, num_experts_per_tok=1)).eval()


def _put(name: str, model: Any) -> Any:
    torch.manual_seed(1)
    cls: Any = find("tuner", name)
    own = {f.name for f in fields(cls)}
    textless = {key: value for key, value in TEXTLESS.items() if key in own}
    return build("tuner", {"name": name, **cls.example, **textless}).attach(model)


def _says(attached: Any) -> torch.Tensor:
    with torch.no_grad():
        return attached.model(IDS).logits


def _yes(done: Callable[[], Any]) -> str:
    """yes where it was done and came out right, no where it is refused."""
    try:
        return "yes" if done() else "no"
    except (RecipeError, ValueError, RuntimeError, NotImplementedError):
        return "no"


def _abilities(name: str) -> dict[str, str]:
    cls: Any = find("tuner", name)
    dress: Callable[[Any], Any] = _coded if "quantized_weights" in cls.requires else lambda model: model
    make: Callable[[], Any] = lambda: dress(_llama(4))
    if LABEL_HEAD in cls.requires:
        make = _labels
    try:
        attached = _put(name, make())
    except RecipeError:  # it needs biases
        make = _biased
        attached = _put(name, make())
    base = make()
    with torch.no_grad():
        for p in attached.parameters().values():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    tuned, untuned = _says(attached), base(IDS).logits.detach()

    def off() -> bool:
        with attached.off():
            return torch.equal(_says(attached), untuned)

    def merge() -> bool:
        with attached.merged():
            return torch.allclose(_says(attached), tuned, atol=1e-4)

    def lora() -> bool:
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            attached.export_lora(Path(folder))
            again = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
            with torch.no_grad():
                return torch.allclose(again(IDS).logits, tuned, atol=1e-3)

    def tied() -> bool:
        if make in (_biased, _labels):
            model = make()
        else:
            model = dress(_llama(4, tie_word_embeddings=True))
        trains = bool(_put(name, model).param_groups())
        if make is _labels:
            return trains  # there is nothing to tie
        return trains and model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def experts() -> bool:
        return any(".experts" in s.name for s in _put(name, dress(_experts())).all_param_groups())

    named = any(f.name == "target_parameters" for f in fields(cls))
    can_export = hasattr(attached, "export_lora")
    return {
        "merge": _yes(merge),
        "off": _yes(off),
        "lora": _yes(lora) if can_export else "no",
        "quantized": _yes(lambda: _on_codes(name, make())) if cls.on_quantized else "no",
        "tied": _yes(tied),
        "experts": "by target_parameters" if named else _yes(experts),
    }


def _coded(model: Any) -> Any:
    """The same network with its linear weights as codes."""
    from luthier.model.quantized import quantize

    quantize(model, build("quantizer", {"name": "rtn", "group_size": 16}))
    return model


def _on_codes(name: str, model: Any) -> bool:
    """Does a gradient reach it on a base whose linear weights are codes?"""
    if "quantized_weights" not in find("tuner", name).requires:
        _coded(model)
    attached = _put(name, model)
    if attached.rewrites_inputs:
        return True  # vectors before the text touch no weight
    model(IDS).logits.square().mean().backward()
    return any(p.grad is not None and bool(p.grad.any()) for p in attached.parameters().values())


def _moving(attached: Any) -> int:
    total = 0
    for group in attached.param_groups():
        for p in group.params.values():
            if p.requires_grad:
                total += p.numel()
    return total


def _share(name: str, meta: nn.Module) -> str:
    """Percent of a Llama-7B's weights that move at once, under the defaults."""
    every = sum(p.numel() for p in meta.parameters())
    try:
        if name == "peft" or any(f.name == "target_modules" for f in fields(find("tuner", name))):
            one, two = (_moving(_weightless(name, layers)) for layers in (1, 2))
            moving = one + (two - one) * (DEPTH - 1)
        else:
            moving = _moving(build("tuner", name).attach(meta))
    except RecipeError:  # it wants biases, or codes
        return "not supported on Llama"
    return f"{100 * moving / every:.3g}"


def _weightless(name: str, layers: int) -> Any:
    """On meta weights; its own tensors are meta, too, unless it draws them from a generator of its own."""
    try:
        with torch.device("meta"):
            return build("tuner", name).attach(_llama(layers, "meta", **SEVEN))
    except RecipeError:
        raise
    except (RuntimeError, NotImplementedError, ValueError):
        return build("tuner", name).attach(_llama(layers, "meta", **SEVEN))
