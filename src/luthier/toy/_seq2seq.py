"""Pretraining of a small T5 on the tasks: completions from prompts, and masked spans of a fifth of the
documents.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from ._encoder import by_length, padded

SENTINELS = [f"<extra_id_{i}>" for i in range(32)]
# share of documents that are restored; of their tokens hidden; tokens of a span on average
RESTORED, RATE, SPAN = 0.2, 0.15, 3


def build(
    tokenizer, hidden: int, layers: int, heads: int, intermediate: int, seed: int
) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    special |= {
        "bos_token_id": tokenizer.bos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden,
        d_kv=hidden // heads,
        d_ff=intermediate,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        initializer_factor=0.5,
        **special,
    )
    model = T5ForConditionalGeneration(config)
    # an untied head is drawn as wide as the embeddings: first losses of 43 nats, which take 60 steps to 12
    with torch.no_grad():
        model.lm_head.weight.mul_(hidden**-0.5)
    return model.bfloat16()


def loss_of(
    model, tokenizer, documents: list[tuple[list[int], list[int]]], batch: int = 40, seed: int = 0
) -> Callable[[int], tuple[Tensor, int]]:
    """documents: (what is read, what is said), in the order they are learned."""
    ordered, sentinels = by_length(documents, batch, seed), tokenizer.convert_tokens_to_ids(SENTINELS)

    def loss(step: int) -> tuple[Tensor, int]:
        some = [documents[i] for i in ordered[step % len(ordered)]]
        draw = np.random.default_rng([seed, step])
        some = [
            corrupted(p + c[:-1], sentinels, c[-1], draw) if draw.random() < RESTORED else (p, c)
            for p, c in some
        ]
        return completion_loss(model, *zip(*some, strict=True)), sum(len(p) + len(c) for p, c in some)

    return loss


def corrupted(
    ids: list[int], sentinels: list[int], end: int, draw: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Spans of the text, each behind a sentinel, and the text with the sentinels in their places."""
    spans = max(1, min(len(sentinels), round(len(ids) * RATE / SPAN)))
    starts = sorted(
        draw.choice(
            np.arange(1, max(2, len(ids))), size=min(spans, max(1, len(ids) - 1)), replace=False
        ).tolist()
    )
    read, hidden, place = [], [], 0
    for k, start in enumerate(starts):
        if start < place:
            continue
        stop = min(len(ids), start + int(draw.integers(1, 2 * SPAN)))
        read += ids[place:start] + [sentinels[k]]
        hidden += [sentinels[k]] + ids[start:stop]
        place = stop
    return read + ids[place:], hidden + [end]


def completion_loss(model, read: tuple[list[int], ...], completions: tuple[list[int], ...]) -> Tensor:
    """Mean loss of the completions."""
    pad = model.config.pad_token_id
    ids, labels = padded(list(read), pad), padded(list(completions), pad)
    begun = torch.cat(
        [labels.new_full((len(labels), 1), model.config.decoder_start_token_id), labels[:, :-1]], 1
    )
    mask = torch.zeros_like(ids)
    for r, row in enumerate(read):
        mask[r, : len(row)] = 1
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=begun, use_cache=False).logits
    real = torch.zeros_like(labels, dtype=torch.bool)
    for r, row in enumerate(completions):
        real[r, : len(row)] = True
    return F.cross_entropy(logits[real].float(), labels[real])
