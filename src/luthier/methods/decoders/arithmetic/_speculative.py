"""Speculative sampling: one network writes ahead, and what a combination of several would have written is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.compat.transformers import with_cache
from luthier.errors import RecipeError
from luthier.model.policy import Policy


class Reader:
    """A causal network with a cache that follows a text, also where its end was taken back."""

    def __init__(self, policy: Policy):
        from transformers import DynamicCache

        if policy.attached.rewrites_inputs:
            raise RecipeError("speculative decoding does not support soft prompts: set draft: 0")
        self.policy, self.ids = policy, []
        self.cache: Any = DynamicCache()

    def read(self, ids: list[int], last: int) -> Tensor:
        """[last, V] logits, in fp32, behind the last tokens of a text, the newest at the end."""
        same = 0
        most = min(len(self.ids), len(ids) - last)
        while same < most and self.ids[same] == ids[same]:
            same += 1
        if same < len(self.ids):
            self.cache.crop(same - len(self.ids))  # how many leave
        device = self.policy.model.get_input_embeddings().weight.device
        new = torch.tensor([ids[same:]], device=device)
        with self.policy.role_context():
            output = self.policy.model(input_ids=new, **with_cache(self.cache), use_cache=True)
        self.ids = list(ids)
        return output.logits[0, -last:].float()


def speculate(
    readers: Sequence[Reader],
    combine: Callable[[list[Tensor]], Tensor],
    prompt: list[int],
    *,
    drafter: int,
    draft: int,
    max_new_tokens: int,
    temperature: float,
    stop: set[int],
    rng: torch.Generator,
) -> list[int]:
    """One completion with the distribution of the combined logits.

    combine: logits [T, V] of each reader -> [T, V]. drafter: which of the readers writes `draft` tokens
    ahead.
    """
    written: list[int] = []
    while len(written) < max_new_tokens and not (written and written[-1] in stop):
        text = prompt + written
        ahead, drafted_from = [], []
        while len(ahead) < min(draft, max_new_tokens - len(written) - 1):
            p = _distribution(readers[drafter].read(text + ahead, 1), temperature)[0]
            ahead.append(_draw(p, rng))
            drafted_from.append(p)
            if ahead[-1] in stop:
                break
        logits = [reader.read(text + ahead, len(ahead) + 1) for reader in readers]
        target = _distribution(combine(logits), temperature)
        for token, p, q in zip(ahead, target, drafted_from, strict=False):
            if float(torch.rand((), generator=rng)) * float(q[token]) >= float(p[token]):
                written.append(_draw((p - q).clamp(min=0), rng))
                break
            written.append(token)
            if token in stop:
                break
        else:
            written.append(_draw(target[-1], rng))
    return written


def _distribution(logits: Tensor, temperature: float) -> Tensor:
    """[T, V] logits -> probabilities; at temperature 0 all on the best token."""
    if temperature:
        return (logits / temperature).softmax(-1).double().cpu()
    best = torch.zeros_like(logits, dtype=torch.float64)
    return best.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0).cpu()


def _draw(weights: Tensor, rng: torch.Generator) -> int:
    """A token in proportion to its weight."""
    return int(torch.multinomial(weights, 1, generator=rng))
