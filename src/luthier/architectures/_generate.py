"""Writing with a decoder: a KV cache, each prompt read once for all its samples, finished sequences dropped.

Sampling is by inverse CDF from uniforms that belong to (seed, sample, position): the same seed writes the same text
whatever else is in the batch, up to the rounding of the network itself.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SEQUENCES = 64  # written at once


def generate(
    model: nn.Module,
    attached,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[int] = (),
) -> list[list[list[int]]]:
    """n completions of each prompt as token ids, the stop token included where one was written.

    temperature 0 is greedy. seeds: one per prompt. Prompts of like length are written together.
    """
    out: list[list[list[int]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    some = max(1, SEQUENCES // n)
    for start in range(0, len(order), some):
        chosen = order[start : start + some]
        draw = [torch.rand(n, max_new_tokens, generator=torch.Generator().manual_seed(seeds[i])) for i in chosen]
        pick = _Picker(torch.cat(draw), temperature, top_p, top_k)
        written = _write(model, attached, [prompts[i] for i in chosen], n, max_new_tokens, pick, set(stop))
        for k, i in enumerate(chosen):
            out[i] = written[k * n : (k + 1) * n]
    return out


class _Picker:
    """Chooses the next token of each sequence."""

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float, top_k: int):
        self.uniforms, self.temperature, self.top_p, self.top_k = uniforms, temperature, top_p, top_k

    def __call__(self, logits: Tensor, which: Tensor, step: int) -> Tensor:
        """[B, V] logits of sequences `which` at `step` -> [B] token ids."""
        if not self.temperature:
            return logits.argmax(-1)
        p = (logits.float() / self.temperature).softmax(-1)
        ids = None
        if self.top_p < 1 or self.top_k:
            p, ids = p.sort(-1, descending=True)
            if self.top_k:
                p[:, self.top_k :] = 0
            if self.top_p < 1:
                p[p.cumsum(-1) - p >= self.top_p] = 0
        total = p.cumsum(-1)
        u = self.uniforms[which.cpu(), step].to(p.device) * total[:, -1]
        place = torch.searchsorted(total, u[:, None], right=True).squeeze(1).clamp(max=p.shape[1] - 1)
        return place if ids is None else ids.gather(1, place[:, None]).squeeze(1)


@torch.no_grad()
def _write(model, attached, prompts, n, limit, pick, stop) -> list[list[int]]:
    device = model.get_input_embeddings().weight.device
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    embed = model.get_input_embeddings()(ids)
    if attached.virtual:  # soft vectors go between the padding and the prompt
        embed, mask = _with_soft(embed, mask, attached.soft().to(embed.dtype))
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    said = model(inputs_embeds=embed, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    cache = said.past_key_values
    if n > 1:
        cache.batch_repeat_interleave(n)
    logits = said.logits[:, -1].repeat_interleave(n, 0)
    mask, position = mask.repeat_interleave(n, 0), position[:, -1:].repeat_interleave(n, 0)

    written: list[list[int]] = [[] for _ in range(len(prompts) * n)]
    which = torch.arange(len(written), device=device)
    for step in range(limit):
        token = pick(logits, which, step)
        for i, t in zip(which.tolist(), token.tolist(), strict=True):
            written[i].append(t)
        going = torch.tensor([t not in stop for t in token.tolist()], device=device)
        if step == limit - 1 or not going.any():
            break
        if not going.all():
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            token, which, mask, position = token[keep], which[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        said = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        logits = said.logits[:, -1]
    return written


def _with_soft(embed: Tensor, mask: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    rows, width, k = len(embed), embed.shape[1], len(soft)
    out = embed.new_zeros(rows, width + k, embed.shape[2])
    seen = mask.new_zeros(rows, width + k)
    for r in range(rows):
        gap = width - int(mask[r].sum())
        out[r, gap : gap + k], out[r, gap + k :] = soft, embed[r, gap:]
        seen[r, gap:] = 1
    return out, seen
