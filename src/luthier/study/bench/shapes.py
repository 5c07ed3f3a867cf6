"""Models with random weights and rows of random tokens: speed depends on their shapes and lengths alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = dict(max_position_embeddings=2048, tie_word_embeddings=True)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> transformers config class, settings
    "tiny": (
        "LlamaConfig",
        LLAMA
        | dict(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
    ),
    "a": (
        "LlamaConfig",
        LLAMA
        | dict(
            vocab_size=32000,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=6,
        ),
    ),
    "b": (
        "LlamaConfig",
        LLAMA
        | dict(
            vocab_size=50304,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
        ),
    ),
    "c": (  # of Qwen2-0.5B; transformers reads no other tokenizer than Qwen2's own beside that network's name
        "LlamaConfig",
        LLAMA
        | dict(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
        ),
    ),
    "gpt2": ("GPT2Config", dict(vocab_size=50257, n_embd=384, n_layer=8, n_head=6, n_positions=1024)),
    "moe": (
        "Qwen2MoeConfig",
        LLAMA
        | dict(
            vocab_size=32000,
            hidden_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            intermediate_size=1024,
        ),
    ),
}
ABOUT = {
    "tiny": "Llama, for tests",
    "a": "Llama, 26M: 8 layers, width 384, 32,000 tokens",
    "b": "Llama, 124M: 12 layers, width 768, 50,304 tokens",
    "c": "Llama in the shape of Qwen2-0.5B, 494M: 24 layers, width 896, 151,936 tokens",
    "gpt2": "GPT-2, 34M: 8 layers, width 384, 50,257 tokens",
    "moe": "Qwen2-MoE, 38M: 4 layers, width 384, 8 experts of which 2",
}
PAD, START, END = 0, 1, 2


def make(shape: str, folder: Path) -> dict[str, int]:
    """Write the model, bfloat16, and a tokenizer whose words are w3, w4, ...; parameters of the body and of
    the head.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    kind, settings = SHAPES[shape]
    config = getattr(transformers, kind)(**settings, pad_token_id=PAD, bos_token_id=START, eos_token_id=END)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = config.vocab_size * model.get_input_embeddings().weight.shape[1]
    body = sum(p.numel() for p in model.parameters()) - head
    if shape == "moe":  # of the experts, those that a token visits
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        body -= experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    if not (folder / "config.json").is_file():
        words = {"<pad>": PAD, "<s>": START, "</s>": END}
        for i in range(3, config.vocab_size):
            words[f"w{i}"] = i
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        fast.save_pretrained(folder)
        model.save_pretrained(folder)
    return {"body": body, "head": head, "vocabulary": config.vocab_size}


def lengths(n: int, seed: int = 0, longest: int = 700) -> list[tuple[int, int]]:
    """Prompt and completion of n rows, in tokens: log-normal around 140 and 80, as chat data are."""
    rng = random.Random(seed)

    def draw(middle: float, spread: float, low: int, high: int) -> int:
        return min(max(int(math.exp(rng.gauss(math.log(middle), spread))), low), high)

    return [(draw(140, 0.55, 8, longest * 4 // 7), draw(80, 0.65, 4, longest * 3 // 7)) for _ in range(n)]


def rows(sizes: Sequence[Sequence[int]], vocabulary: int, seed: int = 0) -> list[list[list[int]]]:
    """Token ids of each part of each row."""
    rng = random.Random(seed + 1)
    rows = []
    for row in sizes:
        rows.append([[rng.randrange(3, vocabulary) for _ in range(size)] for size in row])
    return rows


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)
