"""A tiny Llama, and a tokenizer of bytes with a chat template, both made here."""

from __future__ import annotations

import torch

CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content"
    " }}<|end|>{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}{%"
    " if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """A byte is a token; eos, pad and turn marks are tokens of their own; nothing is added by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|mask|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        additional_special_tokens=special[2:5],
        chat_template=CHAT,
    )


def make_llama(seed: int = 0, **changes):
    """A Llama of 4 layers and about 100,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(
        vocab_size=262,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()
