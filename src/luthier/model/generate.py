"""Writing: each prompt is read once for all its samples, and finished sequences leave the batch, several at a
time.

Sampling is by inverse CDF from uniforms that belong to (seed, sample, position): the same seed writes the
same text whatever else is in the batch, up to the rounding of the network itself.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from os.path import commonprefix
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from luthier.clock import Clock
from luthier.compat.transformers import cache_of, with_cache
from luthier.errors import RecipeError
from luthier.kernels.attention import NAME, takes_plans
from luthier.kernels.decode_attention import ROOM, Decoding, split_layer
from luthier.kernels.prepacked import prepacked
from luthier.kernels.tolerance import logprob_tolerance
from luthier.model.batch import pad
from luthier.model.language_model import embeddings_of, logits_at, prefix_mask, soft_first

if TYPE_CHECKING:
    from luthier.model.network import Network

SEQUENCES = 64  # written at once
COMMON = 64  # tokens that prompts must begin with in common, for that to be read once
LEAVE = 0.25  # share of idle rows at which they leave: each time, what is kept of all others is copied
# what a network raises that cannot be made to write in some way
CANNOT = (
    TypeError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
)
_ways: WeakKeyDictionary[nn.Module, type[Writer]] = WeakKeyDictionary()  # model -> how it writes


def generate(
    writer: Writer,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    begun: Sequence[int] = (),
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[int] = (),
    limit: int | None = None,
    hear: Callable[[list[list[int]]], object] | None = None,
    decoder: Callable[..., Tensor] | None = None,
    join: Callable[[Writer], Writer] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> list[list[list[int]]]:
    """n completions of each prompt as token ids, the stop token included where one was written.

    temperature 0 is greedy. seeds: one per prompt. begun: how many tokens at the end of each prompt were
    written before with its seed, which goes on from there (default: none). Prompts of like length are
    written together. limit: tokens that the network can hold; a sequence ends there. hear: called after
    each token with what prompts written together have so far; where it returns true, they end there.
    decoder: changes the logits before each token (methods/decoders/_base.py). join: puts other networks
    beside the writer, which then write together (`Joined`). rows: whose prompts these are, for tuners that
    read each row in its own way. Raises RecipeError for a prompt that leaves no room.
    """
    if any(begun) and writer.attached.changes_inputs:
        raise RecipeError("a text that was begun cannot be continued where the tuner changes prompts only")
    if join is not None:
        writer = join(writer)
    room = [max_new_tokens] * len(prompts)
    if limit is not None:
        for i, prompt in enumerate(prompts):
            room[i] = min(max_new_tokens, limit - writer.needed(len(prompt)))
    if min(room, default=1) < 1:
        raise RecipeError(
            f"the prompt has {max(map(len, prompts))} tokens, which leaves none to generate:"
            f" the model has {limit} positions"
        )
    out: list[list[list[int]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    some = max(1, SEQUENCES // n)
    for start in range(0, len(order), some):
        chosen = order[start : start + some]
        names, ends, firsts = [], [], []  # of each sequence
        for i in chosen:
            names += [(seeds[i], k) for k in range(n)]
            ends += [room[i]] * n
            firsts += [begun[i] if begun else 0] * n
        pick = Picker(names, max_new_tokens, temperature, top_p, top_k, firsts)
        with prepacked(writer.model):
            texts = [list(prompts[i]) for i in chosen]
            writer.announce(texts, [rows[i] for i in chosen] if rows else [])
            written = _write(writer, texts, n, ends, pick, set(stop), hear, decoder)
        for k, i in enumerate(chosen):
            out[i] = written[k * n : (k + 1) * n]
    return out


@torch.no_grad()
def _write(
    writer: Writer,
    prompts: list[list[int]],
    n: int,
    ends: list[int],
    pick: Picker,
    stop: set[int],
    hear: Callable[..., object] | None = None,
    decoder: Callable[..., Tensor] | None = None,
) -> list[list[int]]:
    logits = writer.begin(prompts, n)
    written: list[list[int]] = [[] for _ in ends]
    # the sequence in each row; finished ones stay until a quarter of the rows is idle
    which = list(range(len(ends)))
    going = set(which)
    while True:
        if decoder is not None:
            before = [prompts[i // n] for i in which], [written[i] for i in which]
            logits = decoder(logits.float().clone(), *before)
        tokens = pick(logits, which, len(written[next(iter(going))]))
        for i, t in zip(which, tokens.tolist(), strict=True):
            if i in going:
                written[i].append(t)
        going = {i for i in going if written[i][-1] not in stop and len(written[i]) < ends[i]}
        if hear and hear(written) or not going:
            return written
        if len(which) - len(going) >= LEAVE * len(which):
            alive = [k for k, i in enumerate(which) if i in going]
            rows = torch.tensor(alive, device=tokens.device)
            writer.keep(rows)
            tokens, which = tokens[rows], [which[k] for k in alive]
        logits = writer.next(tokens)


class Picker:
    """Chooses the next token of each sequence."""

    def __init__(
        self,
        names: Sequence[tuple[int, int]],
        length: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        firsts: Sequence[int] | None = None,
    ):
        """names: the (seed, sample) of each sequence. firsts: at which position of its draws each begins."""
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.buffers: Tensor | None = None  # [2, B, V] in fp32, for whatever is computed of logits
        if temperature:
            uniforms = []
            for (seed, number), first in zip(names, firsts or [0] * len(names), strict=True):
                uniforms.append(uniforms_of(seed, number, first + length)[first:])
            self.uniforms = torch.stack(uniforms)

    def __call__(self, logits: Tensor, which: list[int], step: int) -> Tensor:
        """[B, V] logits of sequences `which` at `step` -> [B] token ids."""
        if not self.temperature:
            return logits.argmax(-1)
        # Written into the same memory at every token: at wide vocabularies, getting it anew costs more than
        # the sums.
        if self.buffers is None or self.buffers.shape[1] < len(logits):
            self.buffers = torch.empty(2, *logits.shape, device=logits.device)
        return sample(
            logits, self.uniforms[which, step], self.temperature, self.top_p, self.top_k, self.buffers
        )


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int, buffers: Tensor
) -> Tensor:
    """[B, V] logits -> [B] token ids, by the inverse CDF at uniforms [B]. buffers: [2, B or more, V] in fp32,
    overwritten.
    """
    one, other = buffers[0, : len(logits)], buffers[1, : len(logits)]
    p, ids = torch.softmax(one.copy_(logits).div_(temperature), -1, out=other), None
    few = 0 < top_k < p.shape[-1]
    if top_p < 1 or few:
        p, ids = p.topk(top_k) if few else p.sort(-1, descending=True)
        p = p / p.sum(-1, keepdim=True)
        # the nucleus: least likely tokens whose better ones already reach top_p go
        p[p.cumsum(-1) - p >= top_p] = 0
    total = torch.cumsum(p, -1, out=one) if ids is None else p.cumsum(-1)
    most = total[:, -1]
    u = uniforms.to(p.device) * most
    # rounding must not lead past the last token
    u = torch.minimum(u, torch.nextafter(most, most.new_zeros(())))
    place = torch.searchsorted(total, u[:, None], right=True)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def uniforms_of(seed: int, number: int, length: int) -> Tensor:
    """[length] what decides each token of a sample, whatever else is in the batch."""
    return torch.rand(length, generator=Clock(seed).rng("sample", number))


# ---------------------------------------------------------------------------------------------- writers


class Writer:
    """A network that is writing some sequences."""

    def __init__(self, model: Network, attached: Any, prefix: bool = False):
        """prefix: prompts are read from both sides."""
        self.model, self.attached, self.prefix = model, attached, prefix
        self.device = model.get_input_embeddings().weight.device

    def needed(self, prompt: int) -> int:
        """Places of the network's positions that a prompt of this length takes."""
        return prompt

    def announce(self, prompts: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> None:
        """Before `begin`: the prompts, and whose they are where that is known."""
        self.attached.announce_prompts(prompts, rows)

    def multiplied(self, count: int, n: int) -> None:
        """From here on there are n sequences of each of `count` prompts."""
        if n > 1:
            self.attached.announce_selected(torch.arange(count, device=self.device).repeat_interleave(n))

    def begin(self, prompts: list[list[int]], n: int) -> Tensor:
        """Read B prompts -> [B * n, V] logits of the first token of n samples each."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        raise NotImplementedError

    def next(self, tokens: Tensor) -> Tensor:
        """[B] the tokens just chosen -> [B, V] logits of those that follow."""
        raise NotImplementedError


def left_padded(
    model: Network, attached: Any, prompts: Sequence[Sequence[int]], begun: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """(what the network is handed of prompts padded on the left, their mask [R, W]); the tuner's soft vectors
    stand in front of each prompt, after its padding. begun: tokens of each that were read before, as were the
    soft vectors.
    """
    embeddings = model.get_input_embeddings()
    width = max(map(len, prompts))
    padded, marks = [], []
    for prompt in prompts:
        padding = [0] * (width - len(prompt))
        padded.append(padding + list(prompt))
        marks.append(padding + [1] * len(prompt))
    ids = torch.tensor(padded, device=embeddings.weight.device)
    mask = torch.tensor(marks, device=ids.device)
    if not attached.rewrites_inputs or begun and not attached.changes_inputs:
        return {"input_ids": ids}, mask
    embed = embeddings_of(model, attached, ids, (mask.cumsum(1) - 1 + begun).where(mask > 0, -1))
    if begun or not attached.virtual:
        return {"inputs_embeds": embed}, mask
    soft = attached.soft().to(embed.dtype)
    embeds = []
    for e, prompt in zip(embed, prompts, strict=True):
        start = width - len(prompt)
        embeds.append(torch.cat([e[:start], soft, e[start:]]))
    mask = torch.cat([mask, mask.new_ones(len(mask), len(soft))], 1).sort(1).values
    return {"inputs_embeds": torch.stack(embeds)}, mask


def repeat_rows(cache: Any, rows: int, n: int) -> None:
    """Every row of a cache n times, one beside the other. Layers with other states than keys and values
    (convolutions, linear attention) can only reorder their rows.
    """
    order = torch.arange(rows).repeat_interleave(n)
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            layer.reorder_cache(order)
        else:
            layer.batch_repeat_interleave(n)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Go on with these rows of a cache only."""
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            layer.reorder_cache(rows)
        else:
            layer.batch_select_indices(rows)


class Cached(Writer):
    """A decoder with a KV cache; prompts padded on the left."""

    def begin(self, prompts, n):
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        common = self.common_beginning(prompts)
        self.cache = None
        if common:
            self.read_beginning(prompts[0][:common], len(prompts))
        logits = self.read_prompts([prompt[common:] for prompt in prompts], common)
        self.position = self.position[:, -1:].repeat_interleave(n, 0)
        self.multiply(n)
        self.multiplied(len(prompts), n)
        return logits.repeat_interleave(n, 0)

    def common_beginning(self, prompts: list[list[int]]) -> int:
        """Tokens of all prompts that are read once: of long ones with the same beginning, where the network
        looks back at all that it has read.
        """
        if len(prompts) < 2 or self.prefix or not self.bare:
            return 0
        if self.attached.rewrites_inputs or self.attached.distinguishes_rows():
            return 0
        common = len(commonprefix(prompts))
        common = min(common, min(map(len, prompts)) - 1)
        return common if common >= COMMON else 0

    def read_beginning(self, tokens: list[int], count: int) -> None:
        """Keys and values of what `count` prompts begin with."""
        ids = torch.tensor([tokens], device=self.device)
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(output)
        self.cache.batch_repeat_interleave(count)

    def read_prompts(self, prompts: list[list[int]], begun: int) -> Tensor:
        """Read B prompts, of which `begun` tokens each are in the cache already -> [B, V] logits."""
        inputs, mask = left_padded(self.model, self.attached, prompts)
        self.position = (mask.cumsum(-1) - 1).clamp(min=0) + begun
        self.mask = torch.cat([mask.new_ones(len(mask), begun), mask], 1)
        where = self.where()
        if self.prefix:
            both = mask.cumsum(1) > self.attached.virtual  # of soft vectors none sees the text
            where["attention_mask"] = prefix_mask(self.model, mask.bool(), both & mask.bool())
        if begun:
            where |= with_cache(self.cache)
        output = self.model(**inputs, **where, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(output)
        return output.logits[:, -1]

    def multiply(self, n: int) -> None:
        """Prompts were read; go on with n samples of each."""
        from transformers.cache_utils import DynamicLayer

        for layer in getattr(self.cache, "layers", ()):
            if type(layer) is DynamicLayer:
                layer.__class__ = _roomy_layer()
        if n > 1:
            repeat_rows(self.cache, len(self.mask), n)
        self.mask = self.mask.repeat_interleave(n, 0)

    def where(self) -> dict[str, Any]:
        """The attention mask, and positions where the network takes them."""
        where = {"attention_mask": self.mask}
        if self.takes_positions:
            where["position_ids"] = self.position
        return where

    def keep(self, rows):
        self.attached.announce_selected(rows)
        select_rows(self.cache, rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def next(self, tokens):
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.position = self.position + 1
        where = self.where()
        if self.bare:  # as the network itself would make it
            where["attention_mask"] = self.mask[:, None, None].bool()
        elif not any(hasattr(layer, "keys") for layer in self.cache.layers):
            del where["attention_mask"]  # of earlier tokens only states are left, which no mask fits
        output = self.model(input_ids=tokens[:, None], **where, **with_cache(self.cache), use_cache=True)
        return output.logits[:, -1]

    @cached_property
    def bare(self) -> bool:
        """Does the network hand a whole mask [B, 1, 1, W] to its attention as it is, in every layer alike?"""
        config = self.model.config.get_text_config()
        if config._attn_implementation not in ("sdpa", NAME) or not self.takes_positions:
            return False
        # what makes more of a mask [B, W]
        if getattr(config, "alibi", False) or getattr(config, "sliding_window", None):
            return False
        kinds = {*(getattr(config, "layer_types", None) or ())}
        return kinds <= {"full_attention"}


class Sharing(Cached):
    """Cached, on a CPU: what samples of a prompt have in common is kept once, and attention is
    kernels/decode_attention.py's.
    """

    def multiply(self, n):
        from transformers.cache_utils import DynamicLayer

        if self.device.type != "cpu" or not takes_plans(self.model) or not self.bare:
            raise NotImplementedError(
                "this model does not support decoding one token at a time with luthier's attention"
            )
        if any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            raise NotImplementedError("this model caches more than keys and values")
        self.decoding = Decoding(torch.arange(len(self.mask) * n), n, self.mask.bool())
        for layer in self.cache.layers:
            split_layer(layer, n)

    def keep(self, rows):
        self.attached.announce_selected(rows)
        self.position = self.position[rows]
        self.decoding, prompts = self.decoding.keep(rows)
        for layer in self.cache.layers:
            layer.keep(rows, prompts)

    def next(self, tokens):
        self.position = self.position + 1
        mask = torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool)
        mask.decoding = self.decoding  # type: ignore[attr-defined]  # kernels/attention.py finds it
        where = {"attention_mask": mask, "position_ids": self.position}
        output = self.model(input_ids=tokens[:, None], **where, **with_cache(self.cache), use_cache=True)
        return output.logits[:, -1]


@lru_cache(maxsize=1)
def _roomy_layer() -> type:
    """transformers' layer of a cache copies itself at every token; this one when ROOM tokens were added."""
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        """keys and values are the filled part of longer tensors."""

        longer: tuple[Tensor, Tensor] | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            keys: Any = self.keys
            values: Any = self.values
            length = keys.shape[-2]
            stop = length + key_states.shape[-2]
            mine = self.longer
            # full, or rows have left
            if mine is None or mine[0].data_ptr() != keys.data_ptr() or mine[0].shape[-2] < stop:
                k = keys.new_empty(*keys.shape[:-2], stop + ROOM, keys.shape[-1])
                v = values.new_empty(*values.shape[:-2], stop + ROOM, values.shape[-1])
                k[..., :length, :] = keys
                v[..., :length, :] = values
                self.longer = mine = (k, v)
            mine[0][..., length:stop, :] = key_states
            mine[1][..., length:stop, :] = value_states
            k = mine[0][..., :stop, :]
            v = mine[1][..., :stop, :]
            self.keys, self.values = k, v
            return k, v

    return Roomy


class Rereading(Writer):
    """A decoder without a cache that takes padding and loses rows (recurrent layers): all is read again for
    each token.
    """

    def begin(self, prompts, n):
        self.read: list[Tensor] = []
        sizes = []  # tokens of each prompt
        for prompt in prompts:
            self.read += [torch.tensor(prompt, device=self.device)] * n
            sizes += [len(prompt)] * n
        self.first = torch.tensor(sizes, device=self.device)
        self.multiplied(len(prompts), n)
        return self.logits()

    def keep(self, rows):
        self.attached.announce_selected(rows)
        self.read, self.first = [self.read[i] for i in rows.tolist()], self.first[rows]

    def next(self, tokens):
        self.read = [torch.cat([r, t[None]]) for r, t in zip(self.read, tokens, strict=True)]
        return self.logits()

    def logits(self) -> Tensor:
        inputs = soft_first(self.model, self.attached, *pad(self.read), prompts=self.first)
        mask = inputs["attention_mask"]
        ends = mask.sum(1) - 1 + torch.arange(len(mask), device=mask.device) * mask.shape[1]
        if self.prefix:
            order = torch.arange(mask.shape[1], device=mask.device) - self.attached.virtual
            both = (order >= 0) & (order < self.first[:, None])
            inputs["attention_mask"] = prefix_mask(self.model, mask.bool(), both)
        return logits_at(self.model, inputs, ends)


class Joined(Writer):
    """Several networks that read the same tokens; what they say of the next one is combined into one."""

    def __init__(
        self,
        writers: Sequence[tuple[Writer, Callable[[], AbstractContextManager]]],
        combine: Callable[[list[Tensor]], Tensor],
    ):
        """writers: each with what its network is called in. combine: logits [B, V] of each, in their order ->
        logits [B, V].
        """
        first, _ = writers[0]
        super().__init__(first.model, first.attached, first.prefix)
        self.writers, self.combine = writers, combine

    def needed(self, prompt):
        return max(writer.needed(prompt) for writer, _ in self.writers)

    def announce(self, prompts, rows):
        for writer, _ in self.writers:
            writer.announce(prompts, rows)

    def begin(self, prompts, n):
        return self.each(lambda writer: writer.begin(prompts, n))

    def keep(self, rows):
        for writer, _ in self.writers:
            writer.keep(rows)

    def next(self, tokens):
        return self.each(lambda writer: writer.next(tokens))

    def each(self, read: Callable[[Writer], Tensor]) -> Tensor:
        """The combined logits of what each network reads now."""
        logits = []
        for writer, context in self.writers:
            with context():
                logits.append(read(writer).float())
        return self.combine(logits)


def decoder_writer(model: Network, attached: Any, prefix: bool = False) -> Writer:
    """The first way to write that writes as rereading everything does. Tried out at a network's first call;
    a warning says where there is none.
    """
    if model not in _ways:
        reason = ""
        with torch.no_grad():
            slow = _trial(Rereading(model, attached, prefix))
            for way in (Sharing, Cached):
                try:
                    gap = float((_trial(way(model, attached, prefix)) - slow).abs().mean())
                except CANNOT as error:
                    first_line, _, _ = str(error).partition("\n")
                    reason = f"fails ({type(error).__name__}: {first_line[:100]})"
                    continue
                if gap <= logprob_tolerance(model):
                    reason = ""
                    break
                reason = f"generates different text (log-probabilities differ by {gap:.1e} on average)"
        _ways[model] = Rereading if reason else way
        if reason:
            name = type(model).__name__
            warnings.warn(
                f"{name} {reason} with a KV cache; generating without it (slower, results are correct)",
                stacklevel=3,
            )
    return _ways[model](model, attached, prefix)


def _trial(writer: Writer) -> Tensor:
    """All log-probabilities of a short trial: prompts of unlike length, two samples each, two sequences left
    behind.
    """
    prompts = [[1], [1, 2, 3, 1, 2]]
    writer.announce(prompts, [])
    logits = [writer.begin(prompts, 2)]
    logits.append(writer.next(torch.tensor([1, 2, 3, 2], device=writer.device)))
    writer.keep(torch.tensor([1, 2], device=writer.device))
    for token in (2, 1):
        logits.append(writer.next(torch.full((2,), token, device=writer.device)))
    return torch.cat(logits).float().log_softmax(-1)


class EncoderDecoder(Writer):
    """An encoder that reads the prompts once, and a decoder with a cache that writes."""

    def __init__(self, model, attached, encode, start: int):
        """encode(ids list) -> (hidden [B, W, d], mask [B, W]); start: the decoder's first token."""
        super().__init__(model, attached)
        self.encode, self.start = encode, start

    def needed(self, prompt):
        return 1  # the decoder's first token; the prompt is the encoder's

    def begin(self, prompts, n):
        hidden, mask = self.encode([torch.tensor(p, device=self.device) for p in prompts])
        self.hidden, self.mask, self.cache = hidden, mask, None
        logits = self.next(torch.full((len(prompts),), self.start, device=self.device))
        if n > 1:
            self.cache.batch_repeat_interleave(n)
            self.hidden, self.mask = self.hidden.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0)
        self.multiplied(len(prompts), n)
        return logits.repeat_interleave(n, 0)

    def keep(self, rows):
        self.attached.announce_selected(rows)
        self.cache.batch_select_indices(rows)
        self.hidden, self.mask = self.hidden[rows], self.mask[rows]

    def next(self, tokens):
        output = self.model(
            encoder_outputs=(self.hidden,),
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None],
            **with_cache(self.cache),
            use_cache=True,
        )
        self.cache = cache_of(output)
        return output.logits[:, -1]
