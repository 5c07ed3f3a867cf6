"""Whole texts cut into sentences by a segmenter: overlapping blocks, averaged probabilities, a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def end_probabilities(roles: Any, text: str, block: int = 256, stride: int = 128) -> list[float]:
    """For every character of a text without line breaks, how likely a sentence ends with it: 0 within tokens.
    Blocks of `block` tokens begin every `stride`; where they overlap, probabilities are averaged.
    """
    policy, renderer = roles.policy, roles.renderer
    ids, spans = renderer.tokens(text)
    before, after = renderer.prefix, renderer.suffix
    device = next(policy.model.parameters()).device
    total, count = torch.zeros(len(ids)), torch.zeros(len(ids))
    for start in block_starts(len(ids), block, stride):
        part = ids[start : start + block]
        read = torch.tensor([[*before, *part, *after]], device=device)
        logits = policy.architecture.logits(policy.model, read)[0, len(before) : len(before) + len(part)]
        total[start : start + len(part)] += logits.float().softmax(-1)[:, 1].cpu()
        count[start : start + len(part)] += 1
    out = [0.0] * len(text)
    for (_, stop), value in zip(spans, (total / count.clamp(min=1)).tolist(), strict=True):
        if stop:
            out[stop - 1] = max(out[stop - 1], value)
    return out


def block_starts(size: int, block: int, stride: int) -> list[int]:
    """Where blocks begin, so that every one of `size` tokens is in one."""
    last = max(0, size - block)
    starts = list(range(0, last + 1, stride))
    if starts[-1] < last:
        starts.append(last)
    return starts


def cut(text: str, probabilities: Sequence[float], threshold: float) -> list[str]:
    """A text in sentences: cut behind every character from a threshold on. Spaces go with the sentence before
    them, so the sentences joined are the text.
    """
    sentences, start = [], 0
    for place, value in enumerate(probabilities):
        stop = place + 1
        if value < threshold or stop <= start:
            continue
        while stop < len(text) and text[stop].isspace():
            stop += 1
        sentences.append(text[start:stop])
        start = stop
    if start < len(text):
        sentences.append(text[start:])
    return sentences


def best_threshold(probabilities: Tensor, ends: Tensor) -> tuple[float, float]:
    """[T] probabilities, [T] which of them are ends -> the threshold with the highest F1, and this F1."""
    order = probabilities.argsort(descending=True)
    values, right = probabilities[order], ends[order].cumsum(0)
    chosen = torch.arange(1, len(values) + 1)
    scores = 2 * right / (chosen + ends.sum()).clamp(min=1)
    # equal probabilities are chosen together: only the last of them is a threshold
    last = torch.ones(len(values), dtype=torch.bool)
    last[:-1] = values[1:] < values[:-1]
    best = int(torch.where(last, scores, -1.0).argmax())
    return float(values[best]), float(scores[best])
