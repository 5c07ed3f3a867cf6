"""Attention of networks that write on a CPU: one token of each sequence at a time, prompts read once for all
their samples.

The fused kernel of CPUs takes five times as long for a single query as two batched matrix products in fp32,
over keys and values that the cache keeps in fp32. And what n samples of a prompt have in common is kept once:
their queries meet the prompt's keys together, as one matrix, and each meets the keys of its own tokens alone.
Both parts end in one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ROOM = 64  # tokens that a cache gains at a time


@dataclass(frozen=True)
class Written:
    """Which sequences are being written. Every token of their own is read, and of their prompt's what is not
    padding.
    """

    place: Tensor  # [B] prompt * n + sample, of each sequence that still goes on
    n: int  # samples of a prompt
    prompt: Tensor  # [P, W] True where a prompt has a token

    def keep(self, rows: Tensor) -> tuple[Written, Tensor]:
        """The same with only these rows, and which prompts they have."""
        place = self.place[rows]
        prompts, mine = (place // self.n).unique(return_inverse=True)
        return Written(mine * self.n + place % self.n, self.n, self.prompt[prompts]), prompts

    def together(self, x: Tensor) -> Tensor:
        """[B, H, g, d] by sequence -> [P, H, n g, d] by prompt; samples that ended are zero."""
        b, h, g, d = x.shape
        spread = x.new_zeros(len(self.prompt) * self.n, h, g, d).index_copy(0, self.place, x)
        return spread.view(-1, self.n, h, g, d).transpose(1, 2).reshape(-1, h, self.n * g, d)

    def apart(self, x: Tensor) -> Tensor:
        """[P, H, n g, d] by prompt -> [B, H, g, d] by sequence."""
        p, h, ng, d = x.shape
        return x.view(p, h, self.n, ng // self.n, d).transpose(1, 2).reshape(p * self.n, h, -1, d)[self.place]


def one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    written: Written,
    scale: float | None = None,
    ahead: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[B, H, 1, D] of one query each [B, H, 1, D]. key, value: [B, H / g, W, D] of the own tokens;
    `key.prompt` holds those of the prompts [P, H / g, V, D]. ahead: keys and values [H / g, m, D] that every
    query meets besides."""
    b, h, _, d = query.shape
    of_keys, of_values = key.prompt  # type: ignore[attr-defined]  # set by the cache
    q = query.reshape(b, key.shape[1], -1, d).float() * (d**-0.5 if scale is None else scale)
    first = written.together(q) @ of_keys.transpose(2, 3)
    first = written.apart(first.masked_fill_(~written.prompt[:, None, None], float("-inf")))
    others = [] if ahead is None else [q @ ahead[0].float().transpose(1, 2)]
    p = torch.cat([first, q @ key.transpose(2, 3), *others], -1).softmax(-1)
    first, own, *others = p.split([of_keys.shape[2], key.shape[2], *(x.shape[-1] for x in others)], -1)
    out = written.apart(written.together(first) @ of_values) + own @ value
    if ahead is not None:
        out = out + others[0] @ ahead[1].float()
    return out.view(b, h, 1, -1).to(query.dtype)


def keep_apart(layer: Any, n: int) -> None:
    """A layer of transformers' dynamic cache that has read the prompts goes on with n samples of each."""
    layer.prompt = layer.keys.float(), layer.values.float()
    layer.longer = tuple(x.new_empty(len(x) * n, x.shape[1], ROOM, x.shape[3]) for x in layer.prompt)
    layer.filled, layer.__class__ = 0, _apart()


@lru_cache(maxsize=1)
def _apart() -> type:
    from transformers.cache_utils import DynamicLayer

    class Apart(DynamicLayer):
        """`prompt`: what was read [P, H, V, D]; `longer`: the own tokens [B, H, W or more, D], of which
        `filled` are there.
        """

        prompt: tuple[Tensor, ...]
        longer: tuple[Tensor, ...]
        filled: int

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            start, self.filled = self.filled, self.filled + key_states.shape[2]
            if self.filled > self.longer[0].shape[2]:
                self.longer = tuple(
                    torch.cat([x, x.new_empty(*x.shape[:2], ROOM, x.shape[3])], 2) for x in self.longer
                )
            k, v = (x[:, :, : self.filled] for x in self.longer)
            k[:, :, start:], v[:, :, start:] = key_states, value_states
            k.prompt = self.prompt  # type: ignore[attr-defined]  # travels with the keys to `one_token`
            return k, v

        def keep(self, rows: Tensor, prompts: Tensor) -> None:
            self.longer = tuple(x[rows] for x in self.longer)
            if len(prompts) < len(self.prompt[0]):
                self.prompt = tuple(x[prompts] for x in self.prompt)

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return self.prompt[0].shape[2] + self.filled

    return Apart
