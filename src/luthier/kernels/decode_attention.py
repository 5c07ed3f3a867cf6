"""Attention of networks that decode on a CPU: one token of each sequence at a time, prompts read once for all
their samples.

The fused kernel of CPUs takes five times as long for a single query as two batched matrix products in fp32,
over keys and values that the cache keeps in fp32. And what n samples of a prompt have in common is stored
once: their queries meet the prompt's keys together, as one matrix, and each meets the keys of its own tokens
alone. Both parts end in one softmax. Sequences that join and leave a batch at any token share nothing
(`RowDecoding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ROOM = 64  # tokens that a cache grows by at a time


@dataclass(frozen=True)
class Decoding:
    """Which sequences are being decoded. All of their own tokens are read, and of their prompt's what is not
    padding.
    """

    sequence: Tensor  # [B] prompt * n + sample, of each sequence that still goes on
    n: int  # samples of a prompt
    prompt_mask: Tensor  # [P, W] True where a prompt has a token

    def keep(self, rows: Tensor) -> tuple[Decoding, Tensor]:
        """The same with only these rows, and which prompts they have."""
        sequence = self.sequence[rows]
        prompts, own = (sequence // self.n).unique(return_inverse=True)
        return Decoding(own * self.n + sequence % self.n, self.n, self.prompt_mask[prompts]), prompts

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `attend_one_token`."""
        return attend_one_token(query, key, value, self, scale, prefix)

    def by_prompt(self, x: Tensor) -> Tensor:
        """[B, H, g, d] by sequence -> [P, H, n g, d] by prompt; samples that ended are zero."""
        b, h, g, d = x.shape
        spread = x.new_zeros(len(self.prompt_mask) * self.n, h, g, d).index_copy(0, self.sequence, x)
        return spread.view(-1, self.n, h, g, d).transpose(1, 2).reshape(-1, h, self.n * g, d)

    def by_sequence(self, x: Tensor) -> Tensor:
        """[P, H, n g, d] by prompt -> [B, H, g, d] by sequence."""
        p, h, ng, d = x.shape
        samples = x.view(p, h, self.n, ng // self.n, d).transpose(1, 2)
        return samples.reshape(p * self.n, h, -1, d)[self.sequence]


@dataclass(frozen=True)
class RowDecoding:
    """Sequences of unlike length that are being decoded, each in a row of its own."""

    bias: Tensor  # [B, 1, 1, W] 0 where a row has a token, else minus infinity

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, H, 1, D] of one query each [B, H, 1, D]. key, value: [B, H / g, W, D] in fp32, finite
        everywhere. prefix: keys and values [H / g, m, D] that every query meets besides.
        """
        b, h, _, d = query.shape
        factor = d**-0.5
        if scale is not None:
            factor = scale
        q = query.reshape(b, key.shape[1], -1, d).float() * factor
        scores = [(q @ key.transpose(2, 3)).add_(self.bias)]
        if prefix is not None:
            scores.append(q @ prefix[0].float().transpose(1, 2))
        p = torch.cat(scores, -1).softmax(-1)
        own, *of_prefix = p.split([x.shape[-1] for x in scores], -1)
        out = own @ value
        if prefix is not None:
            out = out + of_prefix[0] @ prefix[1].float()
        return out.view(b, h, 1, -1).to(query.dtype)


def attend_one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decoding: Decoding,
    scale: float | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[B, H, 1, D] of one query each [B, H, 1, D]. key, value: [B, H / g, W, D] of the own tokens;
    `key.prompt` holds those of the prompts [P, H / g, V, D]. prefix: keys and values [H / g, m, D] that every
    query meets besides.
    """
    b, h, _, d = query.shape
    prompt_key, prompt_value = key.prompt  # type: ignore[attr-defined]  # set by the cache
    factor = d**-0.5
    if scale is not None:
        factor = scale
    q = query.reshape(b, key.shape[1], -1, d).float() * factor
    of_prompt = decoding.by_prompt(q) @ prompt_key.transpose(2, 3)
    of_prompt = of_prompt.masked_fill_(~decoding.prompt_mask[:, None, None], float("-inf"))
    scores = [decoding.by_sequence(of_prompt), q @ key.transpose(2, 3)]
    if prefix is not None:
        scores.append(q @ prefix[0].float().transpose(1, 2))
    p = torch.cat(scores, -1).softmax(-1)
    of_prompt, own, *of_prefix = p.split([x.shape[-1] for x in scores], -1)
    out = decoding.by_sequence(decoding.by_prompt(of_prompt) @ prompt_value) + own @ value
    if prefix is not None:
        out = out + of_prefix[0] @ prefix[1].float()
    return out.view(b, h, 1, -1).to(query.dtype)


def split_layer(layer: Any, n: int) -> None:
    """A layer of transformers' dynamic cache that has read the prompts goes on with n samples of each."""
    layer.prompt = layer.keys.float(), layer.values.float()
    layer.own = tuple(x.new_empty(len(x) * n, x.shape[1], ROOM, x.shape[3]) for x in layer.prompt)
    layer.used = 0
    layer.__class__ = _split_layer()


@lru_cache(maxsize=1)
def _split_layer() -> type:
    from transformers.cache_utils import DynamicLayer

    class SplitLayer(DynamicLayer):
        """Keys and values. `prompt`: of the prompts [P, H, V, D]; `own`: of the sequences' own tokens [B, H,
        W or more, D], `used` of W.
        """

        prompt: tuple[Tensor, ...]
        own: tuple[Tensor, ...]
        used: int

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            start = self.used
            self.used += key_states.shape[2]
            if self.used > self.own[0].shape[2]:
                longer = []
                for x in self.own:
                    longer.append(torch.cat([x, x.new_empty(*x.shape[:2], ROOM, x.shape[3])], 2))
                self.own = tuple(longer)
            k = self.own[0][:, :, : self.used]
            v = self.own[1][:, :, : self.used]
            k[:, :, start:] = key_states
            v[:, :, start:] = value_states
            k.prompt = self.prompt  # type: ignore[attr-defined]  # goes with the keys to `attend_one_token`
            return k, v

        def keep(self, rows: Tensor, prompts: Tensor) -> None:
            self.own = tuple(x[rows] for x in self.own)
            if len(prompts) < len(self.prompt[0]):
                self.prompt = tuple(x[prompts] for x in self.prompt)

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return self.prompt[0].shape[2] + self.used

    return SplitLayer
