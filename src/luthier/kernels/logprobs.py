"""Log-probabilities of chosen tokens straight from hidden states: [T, V] never exists, forward or backward.

log p = z[label] - logsumexp(z), z = softcap(scale * (h W' + b)). The vocabulary is gone through in blocks,
whose log-sum-exps are added up; so a matrix library that lays a weight out anew for a product has one block
of it to lay out. The backward is the closed form (one-hot minus softmax), computed on the same blocks. Where
the head itself does not move (LoRA, prompts), the gradient of the hidden states is made on the way forward,
so logits are made once and not twice. `plain` is the twin that the first batch of every run is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from luthier.kernels._switch import differentiated_otherwise

CHUNK_BYTES = 64 * 2**20  # of fp32 logits alive at once: fewer tokens at a time leave matrix units idle
# of a block of the vocabulary at most; the same whatever is computed, as sums of blocks round by their
# borders
WORDS = 8192
# on a GPU, where launches count and no library lays out a weight anew
CHUNK_BYTES_ON_CUDA = 512 * 2**20
WORDS_ON_CUDA = 2**16


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: a module, and what the network does to its output."""

    module: nn.Module
    scale: float = 1.0  # logits are multiplied by this
    softcap: float = 0.0  # then bounded by cap * tanh(z / cap); 0 = not
    bias: Tensor | None = None  # [V] added to the module's output, before the scale

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V] logits in fp32."""
        z = self.module(hidden).float()
        if self.bias is not None:
            z = z + self.bias
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z

    @property
    def linear(self) -> bool:
        """Is the module nothing but x W' + b (not wrapped by a tuner, not hooked)?"""
        m = self.module
        hooked = m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations")
        return type(m) is nn.Linear and not hooked

    def size(self, hidden: Tensor) -> int:
        """The vocabulary: how many logits a hidden state [..., d] becomes."""
        return getattr(self.module, "out_features", hidden.shape[-1])


def chunk_size(vocabulary: int, device: torch.device | None = None) -> int:
    """Tokens whose fp32 logits may be alive at once: on a GPU a 64th of its memory at most."""
    size = CHUNK_BYTES
    if device is not None and device.type == "cuda":
        size = min(CHUNK_BYTES_ON_CUDA, torch.cuda.get_device_properties(device).total_memory // 64)
    return max(16, size // (4 * vocabulary))


def block_size(vocabulary: int, device: torch.device) -> int:
    """Words of a block of the vocabulary."""
    most = WORDS_ON_CUDA if device.type == "cuda" else WORDS
    blocks = max(1, -(-vocabulary // most))
    return min(vocabulary, -(-vocabulary // blocks // 64) * 64)


def plain(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """[T, d], [T] -> [T]: the obvious way."""
    z = head(hidden)
    return z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(-1)


def normaliser(z: Tensor, p: Tensor | None = None) -> Tensor:
    """[C, V] -> [C, 1] log-sum-exp in fp32, by one fused softmax p: many times faster than torch.logsumexp on
    CPUs.

    z - log p is the same at every word; it is read off at one whose p is far from the smallest number that
    there is.
    """
    if p is None:
        p = z.softmax(-1, dtype=torch.float32)
    if z.requires_grad:
        largest, at = z.max(-1, keepdim=True)  # its p is never 0
        return largest.float() - p.gather(1, at).log()
    at = z[:, :64].argmax(-1, keepdim=True)
    probability = p.gather(1, at)
    if not p.is_cuda and bool((probability > 1e-30).all()):
        return z.gather(1, at).float() - probability.log_()
    return z.amax(-1, keepdim=True).float() - p.amax(-1, keepdim=True).log()


def chunked(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """[T, d], [T] -> [T] in fp32: the same numbers in chunks. `head.linear` must hold.

    A second derivative is right too, through the plain way: its first backward makes [T, V].
    """
    if differentiated_otherwise():
        return plain(hidden, head, labels)
    module = cast(nn.Linear, head.module)
    weight, bias = module.weight, module.bias
    if head.bias is not None:
        more = head.bias.to(weight.dtype)
        if bias is not None:
            more = bias + more
        bias = more
    moves = weight.requires_grad or (bias is not None and bias.requires_grad)
    in_forward = torch.is_grad_enabled() and hidden.requires_grad and not moves
    return _LinearLogProbs.apply(hidden, weight, bias, labels, head.scale, head.softcap, in_forward)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float,
        in_forward: bool,
    ):
        """in_forward: make the gradient of hidden states on the way."""
        logp = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        total = torch.empty_like(logp)
        slope = part_slope = None
        if in_forward:
            slope = torch.empty_like(hidden)  # [T, d] -d log p / d hidden
        space = Workspace(weight, len(hidden))
        for part in space.tokens():
            if slope is not None:
                part_slope = slope[part]
            logp[part], total[part] = _logprobs(
                hidden[part], weight, bias, labels[part, None], scale, softcap, space, part_slope
            )
        ctx.save_for_backward(hidden, weight, bias, labels, slope, total)
        ctx.settings = scale, softcap
        return logp.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, labels, slope, total = ctx.saved_tensors
        scale, softcap = ctx.settings
        if torch.is_grad_enabled():  # create_graph: somebody will differentiate this gradient
            return *_differentiable_grads(ctx, grad), *[None] * 4
        if slope is not None:
            return (slope * -grad[:, None]).to(slope.dtype), *[None] * 6
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = d_weight = d_bias = None
        if needs_hidden:
            d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if needs_weight:
            d_weight = torch.empty_like(weight)
        if needs_bias:
            d_bias = torch.empty_like(bias)
        space = Workspace(weight, len(hidden))
        for words in space.words():
            w = weight[words]
            sum_w = sum_b = None
            if needs_weight:
                sum_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
            if needs_bias:
                sum_b = torch.zeros(len(w), dtype=torch.float32, device=w.device)
            for part in space.tokens():
                z = _logits(hidden[part], w, bias, words, scale, softcap, space)
                dz = space.wide(z).sub_(total[part]).exp_()
                at, inside = _within(labels[part, None], words)
                dz.scatter_add_(1, at, -inside.float())
                dz = _before_cap(dz, z, scale, softcap).mul_(-grad[part, None])
                if sum_b is not None:
                    sum_b += dz.sum(0)
                dz = space.narrow(dz)
                if d_hidden is not None:
                    d_hidden[part] += dz @ w
                if sum_w is not None:
                    sum_w += dz.T @ hidden[part]
            if d_weight is not None and sum_w is not None:
                d_weight[words] = sum_w
            if d_bias is not None and sum_b is not None:
                d_bias[words] = sum_b
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, d_bias, *[None] * 4


def _differentiable_grads(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Of hidden, weight and bias, by plain operations."""
    hidden, weight, bias, labels, *_ = ctx.saved_tensors
    scale, softcap = ctx.settings
    needed = ctx.needs_input_grad[:3]
    z = nn.functional.linear(hidden, weight, bias).float() * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    logp = z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(-1)
    inputs = [x for x, need in zip((hidden, weight, bias), needed, strict=True) if need]
    grads = list(torch.autograd.grad(logp, inputs, grad, create_graph=True))
    return [grads.pop(0) if need else None for need in needed]


def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    space: Workspace,
    slope: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[C, d], labels [C, 1] -> log-probabilities [C, 1] and log-sum-exps [C, 1]; writes -d log p / d hidden
    [C, d] into `slope`.

    A block's products are of its own softmax: what share it has of the whole is known when all blocks are,
    and scales rows. The label's part is added last, in fp32: with p near 1, 1 - p must not be rounded.
    """
    total = torch.full(labels.shape, -torch.inf, device=hidden.device)
    label_logit = torch.empty(labels.shape, device=hidden.device)
    mean = None  # of the rows of W, by the softmax so far
    if slope is not None:
        mean = torch.zeros(hidden.shape, device=hidden.device)
    for words in space.words():
        w = weight[words]
        z = _logits(hidden, w, bias, words, scale, softcap, space)
        p = space.wide(z)
        torch.softmax(p, -1, out=p)
        own = normaliser(z, p)
        at, inside = _within(labels, words)
        label_logit = torch.where(inside, z.gather(1, at).float(), label_logit)
        more = torch.logaddexp(total, own)
        if mean is not None:
            p.scatter_(1, at, p.gather(1, at).masked_fill_(inside, 0.0))
            product = torch.mm(space.narrow(_before_cap(p, z, 1.0, softcap)), w)
            mean.mul_((total - more).exp_()).addcmul_(product, (own - more).exp_())
        total = more
    logp = label_logit - total
    if mean is not None and slope is not None:
        missing = _before_cap(logp.expm1(), label_logit, 1.0, softcap)
        slope.copy_(mean.addcmul_(weight[labels.squeeze(1)], missing).mul_(scale))
    return logp, total


def _within(labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """[C, 1] indices of labels in a block of the vocabulary, and whether they are in it."""
    inside = (labels >= words.start) & (labels < words.stop)
    return torch.where(inside, labels - words.start, 0), inside


class Workspace:
    """Memory in which the logits of one block after another are computed: getting it anew for each costs a
    CPU as much time as the softmax.
    """

    def __init__(self, weight: Tensor, tokens: int):
        self.vocabulary = len(weight)
        self.n_tokens = tokens
        self.block = block_size(self.vocabulary, weight.device)
        self.chunk = max(1, min(tokens, chunk_size(self.block, weight.device)))
        self.z = weight.new_empty(self.chunk * self.block)
        self.p = torch.empty(self.chunk * self.block, dtype=torch.float32, device=weight.device)

    def words(self) -> Iterator[slice]:
        """Blocks of the vocabulary."""
        for start in range(0, self.vocabulary, self.block):
            yield slice(start, min(start + self.block, self.vocabulary))

    def tokens(self) -> Iterator[slice]:
        """Chunks of the tokens."""
        for start in range(0, self.n_tokens, self.chunk):
            yield slice(start, start + self.chunk)

    def logits(self, tokens: int, words: int) -> Tensor:
        """[C, B] to write them into."""
        return self.z[: tokens * words].view(tokens, words)

    def wide(self, z: Tensor) -> Tensor:
        """[C, B] in fp32."""
        return self.p[: z.numel()].view(z.shape).copy_(z)

    def narrow(self, dz: Tensor) -> Tensor:
        """In the weight's precision; written over the logits, which are no longer needed."""
        if dz.dtype == self.z.dtype:
            return dz
        return self.logits(*dz.shape).copy_(dz)


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    words: slice,
    scale: float,
    softcap: float,
    space: Workspace,
) -> Tensor:
    """[C, d] -> [C, B] logits of one block of the vocabulary. weight [B, d] is the block's; bias [V] is of
    the whole vocabulary, in which the block is `words`.
    """
    z = space.logits(len(hidden), len(weight))
    if bias is None:
        torch.mm(hidden, weight.T, out=z)
    else:
        torch.addmm(bias[words], hidden, weight.T, out=z)
    if scale != 1.0:
        z = z.float().mul_(scale)
    if softcap:
        z = z.float().div_(softcap).tanh_().mul_(softcap)
    return z


def _before_cap(dz: Tensor, z: Tensor, scale: float, softcap: float) -> Tensor:
    """Slopes by capped and scaled logits z become, in place, slopes by what the head's product gives."""
    if softcap:
        dz = dz.mul_(1 - (z / softcap).square())
    if scale != 1.0:
        dz = dz.mul_(scale)
    return dz
