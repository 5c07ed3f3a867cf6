"""Pretraining of a small BERT: masked tokens of a document are predicted from both sides.

A document is a row of its own, so that the first token stands first, as a classifier reads it. Of half the
documents with a short completion the whole completion is hidden, as a cloze row hides it; of all others a
fifth of the tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

ASKED = 0.2  # weight of a prompt's token in the loss, of a completion's it is 1: prompts are mostly chance
SHORT = 8  # tokens of a completion that is hidden whole
WHOLE = 0.8  # how often
# share of tokens asked; of these replaced by the mask token, by a random one
HIDDEN, MASKED, RANDOM = 0.2, 0.8, 0.1


def build(tokenizer, hidden: int, layers: int, heads: int, intermediate: int, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5 * hidden**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return BertForMaskedLM(config).bfloat16()


def loss_of(
    model, tokenizer, documents: list[tuple[list[int], list[int]]], batch: int = 24, seed: int = 0
) -> Callable[[int], tuple[Tensor, int]]:
    """documents: (prompt ids, completion ids), in the order they are read; batches are of documents of like
    length.
    """
    ordered = by_length(documents, batch, seed)

    def loss(step: int) -> tuple[Tensor, int]:
        some = [documents[i] for i in ordered[step % len(ordered)]]
        draw = np.random.default_rng([seed, step])
        ids, labels = padded([p + c for p, c in some], tokenizer.pad_token_id), None
        labels, weight = torch.full_like(ids, -100), torch.ones(ids.shape)
        for r, (prompt, completion) in enumerate(some):
            size = len(prompt) + len(completion)
            whole = 0 < len(completion) - 1 <= SHORT and draw.random() < WHOLE
            hidden = np.arange(len(prompt), size - 1) if whole else np.flatnonzero(draw.random(size) < HIDDEN)
            hidden = hidden[hidden > 0]
            labels[r, hidden] = ids[r, hidden]
            weight[r, : len(prompt)] = ASKED
            fate = np.zeros(len(hidden)) if whole else draw.random(len(hidden))
            ids[r, hidden[fate < MASKED]] = tokenizer.mask_token_id
            wrong = hidden[(fate >= MASKED) & (fate < MASKED + RANDOM)]
            ids[r, wrong] = torch.from_numpy(draw.integers(len(tokenizer), size=len(wrong)))
        mask = torch.zeros_like(ids)
        for r, (prompt, completion) in enumerate(some):
            mask[r, : len(prompt) + len(completion)] = 1
        states = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        labelled = labels >= 0
        losses = F.cross_entropy(model.cls(states[labelled]).float(), labels[labelled], reduction="none")
        return (losses * weight[labelled]).sum() / weight[labelled].sum(), int(mask.sum())

    return loss


def by_length(
    documents: list[tuple[list[int], list[int]]], batch: int, seed: int, pool: int = 64
) -> list[np.ndarray]:
    """Batches of documents of like length, out of pools of consecutive ones; the batches of a pool in random
    order.
    """
    draw, out = np.random.default_rng(seed), []
    sizes = np.array([len(p) + len(c) for p, c in documents])
    for first in range(0, len(documents) - batch + 1, batch * pool):
        some = first + np.argsort(sizes[first : first + batch * pool], kind="stable")
        groups = [some[i : i + batch] for i in range(0, len(some) - batch + 1, batch)]
        out += [groups[i] for i in draw.permutation(len(groups))]
    return out


def padded(rows: list[list[int]], pad: int, multiple: int = 8) -> Tensor:
    """[rows, longest], the width rounded up so that few widths occur."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])
