"""Tokenizers with the chat templates of public model families, as TRL ships them; without TRL, none."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TRL = Path(find_spec("trl").origin).parent / "chat_templates" if find_spec("trl") else Path("none")
CONTROL = re.compile(
    r"<[|｜][^<>{}'\" ]+[|｜]>|<\|turn>|<turn\|>|<(?:start|end)_of_turn>|\[/?[A-Z][A-Z_]+\]|<bos>|<eos>|</?s>"
)
# family -> (TRL's file, BOS, the token that ends a reply)
FAMILIES = {
    "Cohere Command-R": ("cohere", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "Cohere Command-R7B": ("cohere2", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "DeepSeek-R1": ("deepseek_r1_distill", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "DeepSeek-V3": ("deepseekv3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "Gemma 1": ("gemma", "<bos>", "<end_of_turn>"),
    "Gemma 3": ("gemma3", "<bos>", "<end_of_turn>"),
    "Gemma 4": ("gemma4_v5", "<bos>", "<turn|>"),
    "GLM-4.5": ("glm4moe", "[gMASK]", "<|user|>"),
    "gpt-oss": ("gptoss", "<|startoftext|>", "<|return|>"),
    "LFM2": ("lfm2_v2", "<|startoftext|>", "<|im_end|>"),
    "LFM2.5": ("lfm2_2_5_v2", "<|startoftext|>", "<|im_end|>"),
    "Llama 3": ("llama3", "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3.1": ("llama3_1", "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3.2": ("llama3_2", "<|begin_of_text|>", "<|eot_id|>"),
    "Nemotron 3": ("nemotron_3_nano", "<s>", "<|im_end|>"),
    "Phi-3": ("phi3", "<s>", "<|end|>"),
    "Phi-3.5": ("phi3_5", "<s>", "<|end|>"),
    "Qwen2.5": ("qwen2_5", None, "<|im_end|>"),
    "Qwen3": ("qwen3", None, "<|im_end|>"),
    "Qwen3 Instruct 2507": ("qwen3_instruct_2507", None, "<|im_end|>"),
    "Qwen3.5": ("qwen3_5_think", None, "<|im_end|>"),
    "SmolVLM": ("smolvlm", "<|im_start|>", "<end_of_utterance>"),
}


def template_of(family: str) -> str:
    """A family's chat template."""
    return (TRL / f"{FAMILIES[family][0]}.jinja").read_text(encoding="utf-8")


def tokenizer_for(template: str, bos: str | None = None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with a chat template and the special tokens that it writes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a small text to learn from"], trainer)
    control = {*CONTROL.findall(template), eos, "<pad>"}
    if bos:
        control.add(bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=sorted(control - {eos, "<pad>", bos}),
        chat_template=template,
    )


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that renders as a family's does."""
    _, bos, eos = FAMILIES[family]
    return tokenizer_for(template_of(family), bos, eos)
