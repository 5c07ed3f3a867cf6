"""Causal networks, prompts, and greedy generation by transformers alone."""

from __future__ import annotations

import torch

from helpers import zoo
from luthier.registry import build

CAUSAL = build("architecture", "causal")


PROMPTS = [zoo.tokens(n, n) for n in (7, 3, 1, 12)]


def own_greedy(model, prompt, new, **how):
    """transformers' greedy tokens after one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0, **how
    )
    return out[0]


BART = dict(
    vocab_size=zoo.WORDS,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    init_std=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
