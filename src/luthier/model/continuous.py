"""A batch of sequences that are written together, and that join and leave it at any token.

Keys and values lie in rows, each filled from its first column: a sequence that joins is copied into the next
row, and where one leaves the last row moves up. Nothing else is copied, whatever the others' lengths are.
What a prompt has in common with one that was read before is not read again (`PrefixCache`, or a row that is
being written).

Networks whose state is more than keys and values (recurrent layers, windows, encoders) write each sequence by
itself (`SeparateSequences`): the same answers, and no faster for many.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.compat.transformers import cache_of, with_cache
from luthier.errors import out_of_memory
from luthier.kernels.attention import NAME, takes_plans
from luthier.kernels.decode_attention import RowDecoding
from luthier.kernels.tolerance import logprob_tolerance
from luthier.model.generate import CANNOT, Cached, Rereading, Writer, left_padded

if TYPE_CHECKING:
    from luthier.methods.architectures._base import Architecture
    from luthier.model.network import Network
    from luthier.model.row_adapters import RowAdapters

CHUNK = 512  # tokens of prompts that are read at once: those who write wait for as long
COLUMNS = 64  # that rows grow by at a time
SHORTEST_PREFIX = 16  # tokens: a shorter one is read again sooner than copied
PREFIX_BYTES = 2**28  # of keys and values of sequences that have ended

LayerState = tuple[Tensor, Tensor]  # keys and values [K, W, d] of a sequence in one layer


@dataclass
class Reading:
    """A prompt on its way into a batch."""

    tokens: Sequence[int]
    adapter: int | None = None
    done: int = 0  # tokens that were read
    reused: int = 0  # of these, tokens that another sequence had read
    layers: list[LayerState] = field(default_factory=list)  # of what was read
    state: Any = None  # what else the batch keeps of it

    @property
    def complete(self) -> bool:
        """Whether all of it was read."""
        return self.done == len(self.tokens)


class SequenceBatch:
    """Sequences in rows 0, 1, ... that are being written. Reading a prompt gives the logits of its first
    token; a row for it is taken by `join`, as often as samples are wanted.
    """

    token_bytes = 0  # that a column of a row takes in all layers, once a sequence has joined; 0: not known

    def __init__(self) -> None:
        self.adapters: list[int | None] = []  # of each row

    def __len__(self) -> int:
        return len(self.adapters)

    def begin(self, tokens: Sequence[int], adapter: int | None = None) -> Reading:
        """A prompt that is to be read."""
        return Reading(tokens, adapter)

    def together(self, readings: Sequence[Reading]) -> list[Reading]:
        """Those of the readings, in order, that are read at once; at least the first."""
        return list(readings[:1])

    def read(self, readings: Sequence[Reading]) -> Tensor:
        """Go on reading these, which `together` chose: [len(readings), V] logits of the token after what was
        read, which are those of a first token where a reading is complete.
        """
        raise NotImplementedError

    def join(self, reading: Reading) -> int:
        """A further row for a prompt that was read: its number."""
        raise NotImplementedError

    def leave(self, row: int) -> int | None:
        """A sequence has ended. Returns the number of the row that takes its place: the last one, or None
        where it was the last itself.
        """
        raise NotImplementedError

    def next(self, tokens: Sequence[int]) -> Tensor:
        """The tokens just chosen, one a row -> [B, V] logits of those that follow."""
        raise NotImplementedError

    def clear(self) -> None:
        """All sequences end, whatever state they are in."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------- side by side


class SideBySide(SequenceBatch):
    """One pass of the network for a token of every sequence."""

    def __init__(
        self,
        model: Network,
        attached: Any,
        adapters: RowAdapters | None = None,
        prefix_bytes: int = PREFIX_BYTES,
    ):
        super().__init__()
        self.model, self.attached, self.row_adapters = model, attached, adapters
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        # luthier's attention for single queries wants keys and values in fp32
        self.own_attention = self.device.type == "cpu" and takes_plans(model)
        self.prefixes = PrefixCache(prefix_bytes)
        self.reach = reach_of(model)
        self.clear()

    def clear(self):
        self.adapters = []
        self.tokens: list[list[int]] = []  # of each row, whose keys and values it holds
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)  # filled columns of each row
        self.layers: list[Any] = []  # a `row_layer` each
        self.cache: Any = None

    # --- reading

    def begin(self, tokens, adapter=None):
        reading = Reading(tokens, adapter)
        source, shared = self.longest_prefix(tokens, adapter)
        if source is not None:
            columns = self.attached.virtual + shared
            reading.layers = [(k[:, :columns], v[:, :columns]) for k, v in source]
            if any(k.dtype != self.dtype for k, _ in reading.layers):
                reading.layers = [(k.to(self.dtype), v.to(self.dtype)) for k, v in reading.layers]
            reading.done = reading.reused = shared
        return reading

    def longest_prefix(
        self, tokens: Sequence[int], adapter: int | None
    ) -> tuple[list[LayerState] | None, int]:
        """(keys and values of the sequence that begins most like these tokens, how many tokens they share);
        the last token is always read, since its logits are needed. None and 0 where nobody has read enough.
        """
        if self.attached.changes_inputs:
            return None, 0  # what was an answer then is a prompt now
        source, most = self.prefixes.longest(tokens, adapter)
        row = None
        for i, own in enumerate(self.tokens):
            if self.adapters[i] == adapter and (shared := common_prefix(own, tokens)) > most:
                row, most = i, shared
        most = min(most, len(tokens) - 1)
        if most < SHORTEST_PREFIX:
            return None, 0
        if row is not None:
            # a copy: the row may move before the reading joins
            columns = self.attached.virtual + most
            source = []
            for layer in self.layers:
                source.append((layer.keys[row, :, :columns].clone(), layer.values[row, :, :columns].clone()))
        return source, most

    def together(self, readings):
        first = readings[0]
        if first.done or len(first.tokens) >= CHUNK:
            return [first]
        some, width = [], 0
        for reading in readings:
            if reading.done or len(reading.tokens) >= CHUNK:
                continue
            width = max(width, len(reading.tokens))
            if width * (len(some) + 1) > CHUNK:
                break
            some.append(reading)
        return some

    def read(self, readings):
        if len(readings) == 1 and (readings[0].done or len(readings[0].tokens) > CHUNK):
            return self.read_on(readings[0])
        inputs, mask = left_padded(self.model, self.attached, [reading.tokens for reading in readings])
        output = self.forward(readings, inputs, mask, dynamic_cache([]))
        states = kv_states(cache_of(output))
        for i, reading in enumerate(readings):
            start = mask.shape[1] - self.attached.virtual - len(reading.tokens)
            reading.layers = [(k[i, :, start:], v[i, :, start:]) for k, v in states]
            reading.done = len(reading.tokens)
        return output.logits[:, -1]

    def read_on(self, reading: Reading) -> Tensor:
        """The next tokens of a prompt, after those that were read: [1, V]."""
        chunk = list(reading.tokens[reading.done : reading.done + CHUNK])
        cache = dynamic_cache(reading.layers)
        if reading.done:
            inputs, _ = left_padded(self.model, self.attached, [chunk], begun=reading.done)
        else:
            inputs, _ = left_padded(self.model, self.attached, [chunk])
        reading.done += len(chunk)
        columns = self.attached.virtual + reading.done
        mask = torch.ones(1, columns, dtype=torch.long, device=self.device)
        output = self.forward([reading], inputs, mask, cache)
        reading.layers = [(k[0], v[0]) for k, v in kv_states(cache_of(output))]
        return output.logits[:, -1]

    def forward(
        self, readings: Sequence[Reading], inputs: dict[str, Tensor], mask: Tensor, cache: Any
    ) -> Any:
        """The network's output for prompts, padded on the left, after what is in the cache."""
        size = next(iter(inputs.values())).shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -size:]
        with self.adapted([reading.adapter for reading in readings]):
            return self.model(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                **with_cache(cache),
                use_cache=True,
                logits_to_keep=1,
            )

    def adapted(self, adapters: Sequence[int | None]) -> AbstractContextManager:
        """While rows with these adapters are read."""
        if self.row_adapters is None:
            return nullcontext()
        return self.row_adapters.on(adapters)

    # --- rows

    def join(self, reading):
        row, columns = len(self), self.attached.virtual + len(reading.tokens)
        if not self.layers:
            self.layers = [row_layer()(k, v, self.own_attention) for k, v in reading.layers]
            self.cache = dynamic_cache([])
            self.cache.layers = self.layers
            self.token_bytes = sum(layer.token_bytes for layer in self.layers)
        for layer, (keys, values) in zip(self.layers, reading.layers, strict=True):
            layer.reserve(row + 1, columns + 1)
            layer.keys[row, :, :columns] = keys
            layer.values[row, :, :columns] = values
        self.adapters.append(reading.adapter)
        self.tokens.append(list(reading.tokens))
        self.lengths = torch.cat([self.lengths, self.lengths.new_tensor([columns])])
        return row

    def leave(self, row):
        last, columns = len(self) - 1, self.attached.virtual + len(self.tokens[row])
        if self.prefixes.takes(len(self.tokens[row])):
            states = []
            for layer in self.layers:
                keys, values = layer.keys[row, :, :columns], layer.values[row, :, :columns]
                # those of the network's own precision, which fp32 held, take less room
                states.append((keys.to(self.dtype, copy=True), values.to(self.dtype, copy=True)))
            self.prefixes.store(self.tokens[row], self.adapters[row], states)
        if row < last:
            filled = int(self.lengths[last])
            for layer in self.layers:
                layer.keys[row, :, :filled] = layer.keys[last, :, :filled]
                layer.values[row, :, :filled] = layer.values[last, :, :filled]
            self.adapters[row], self.tokens[row] = self.adapters[last], self.tokens[last]
            self.lengths[row] = self.lengths[last]
        self.adapters.pop()
        self.tokens.pop()
        self.lengths = self.lengths[:last].clone()
        if not last:
            self.clear()  # rows as long as the longest sequence was go with it
            return None
        return last if row < last else None

    def next(self, tokens):
        width = int(self.lengths.max()) + 1
        for layer in self.layers:
            layer.aim(self.lengths, width)
        ids = torch.tensor(tokens, device=self.device)
        with self.adapted(self.adapters):
            output = self.model(
                input_ids=ids[:, None],
                attention_mask=self.masks(width),
                position_ids=self.lengths[:, None],
                **with_cache(self.cache),
                use_cache=True,
            )
        for own, token in zip(self.tokens, tokens, strict=True):
            own.append(token)
        self.lengths = self.lengths + 1
        return output.logits[:, -1]


    def masks(self, width: int) -> Any:
        """What a new token of each row sees: [B, 1, 1, width], or one of them for each kind of layer."""
        columns = torch.arange(width, device=self.device)
        last = self.lengths[:, None]
        masks = {}
        for kind, (window, chunk) in self.reach.items():
            mask = columns <= last
            if window is not None:
                mask &= columns > last - window
            if chunk is not None:
                mask &= columns >= last - last % chunk
            mask = mask[:, None, None]
            if self.own_attention:
                bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
                mask.decoding = RowDecoding(bias)  # type: ignore[attr-defined]  # kernels/attention.py finds it
            masks[kind] = mask
        return masks.get(None, masks)


@lru_cache(maxsize=1)
def row_layer() -> type:
    """A layer of transformers' cache."""
    from transformers.cache_utils import DynamicLayer

    class RowLayer(DynamicLayer):
        """Keys and values of one layer, in rows [B or more, K, W or more, d] that are finite everywhere."""

        def __init__(self, keys: Tensor, values: Tensor, own_attention: bool):
            """keys, values: [K, W, d] of one sequence, for their shape."""
            super().__init__()
            self.is_initialized = True
            dtype = torch.float32 if own_attention else keys.dtype
            self.keys = keys.new_zeros(0, len(keys), 0, keys.shape[-1], dtype=dtype)
            self.values = values.new_zeros(0, len(values), 0, values.shape[-1], dtype=dtype)

        @property
        def token_bytes(self) -> int:
            """Bytes of a column of a row."""
            sizes = [x.shape[1] * x.shape[3] * x.element_size() for x in (self.keys, self.values)]
            return sum(sizes)

        def reserve(self, rows: int, columns: int) -> None:
            """Room for so many rows and columns, and some more."""
            have_rows, heads, have_columns, _ = self.keys.shape
            if rows <= have_rows and columns <= have_columns:
                return
            rows = have_rows if rows <= have_rows else rows + rows // 2
            columns = have_columns if columns <= have_columns else -(-columns // COLUMNS) * COLUMNS
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros(rows, heads, columns, old.shape[-1])
                new[:have_rows, :, :have_columns] = old
                setattr(self, name, new)

        def aim(self, lengths: Tensor, width: int) -> None:
            """Where the next tokens go, one a row; `width` columns are read then."""
            self.lengths, self.width = lengths, width
            self.reserve(len(lengths), width)

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Keys and values [B, K, 1, d] of new tokens -> those of all, [B, K, W, d]."""
            b = len(key_states)
            rows = torch.arange(b, device=key_states.device)
            self.keys[rows, :, self.lengths] = key_states[:, :, 0].to(self.keys.dtype)
            self.values[rows, :, self.lengths] = value_states[:, :, 0].to(self.values.dtype)
            return self.keys[:b, :, : self.width], self.values[:b, :, : self.width]

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            """Columns before the new tokens."""
            return self.width - 1

        def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
            """(columns that are read, the first of them)"""
            return self.width, 0

    return RowLayer


def reach_of(model: Network) -> dict[str | None, tuple[int | None, int | None]]:
    """Kind of layer -> (window, chunk) within which it sees; None is the kind of all layers where they have
    no kinds. Raises NotImplementedError where a mask does not say what a layer sees, or is not taken.
    """
    config = model.config.get_text_config()
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    reach = {
        "full_attention": (None, None),
        "sliding_attention": (window, None),
        "chunked_attention": (None, chunk),
    }
    kinds = {*(getattr(config, "layer_types", None) or ())}
    if config._attn_implementation not in ("sdpa", NAME) or getattr(config, "alibi", False):
        raise NotImplementedError("its attention takes no whole masks")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise NotImplementedError("it takes no positions")
    if not kinds <= reach.keys():
        raise NotImplementedError("it has layers with another state than keys and values")
    if kinds == {"full_attention"}:
        return {None: (None, None)}
    if not kinds:
        return {None: (window, None)}
    return {kind: reach[kind] for kind in sorted(kinds)}


def kv_states(cache: Any) -> list[LayerState]:
    """Keys and values [R, K, W, d] of each layer. Raises NotImplementedError where a cache holds more."""
    from transformers.cache_utils import DynamicLayer

    states = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise NotImplementedError("this model caches more than keys and values")
        states.append((layer.keys, layer.values))
    return states


def dynamic_cache(states: Sequence[LayerState]) -> Any:
    """A cache of transformers that holds one sequence's keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (keys, values) in enumerate(states):
        cache.update(keys[None], values[None], i)
    return cache


class PrefixCache:
    """Keys and values of sequences that have ended, for prompts that begin like them; those that were not
    used for longest go when there are more than `most` bytes.
    """

    def __init__(self, most: int):
        self.most, self.bytes = most, 0
        self.entries: OrderedDict[tuple, list[LayerState]] = OrderedDict()  # (adapter, tokens) -> layers

    def takes(self, tokens: int) -> bool:
        """Whether a sequence of this length is worth its room."""
        return self.most > 0 and tokens >= SHORTEST_PREFIX

    def longest(self, tokens: Sequence[int], adapter: int | None) -> tuple[list[LayerState] | None, int]:
        """(the states of the sequence that begins most like these tokens, how many tokens they share)"""
        best, most = None, 0
        tokens = tuple(tokens)
        for key in self.entries:
            own_adapter, own = key
            # compared at once: most begin with other tokens than the best so far
            if own_adapter == adapter and own[: most + 1] == tokens[: most + 1]:
                shared = common_prefix(own, tokens)
                if shared > most:
                    best, most = key, shared
        if best is None:
            return None, 0
        self.entries.move_to_end(best)
        return self.entries[best], most

    def store(self, tokens: Sequence[int], adapter: int | None, states: list[LayerState]) -> None:
        """A sequence that has ended; those that it begins with go."""
        tokens = tuple(tokens)
        for key in list(self.entries):
            if key[0] == adapter and key[1] == tokens[: len(key[1])]:
                self.drop(key)
        self.entries[adapter, tokens] = states
        self.bytes += size_of(states)
        while self.bytes > self.most:
            self.drop(next(iter(self.entries)))

    def drop(self, key: tuple) -> None:
        """Forget a sequence."""
        self.bytes -= size_of(self.entries.pop(key))


def size_of(states: Sequence[LayerState]) -> int:
    """Bytes of keys and values."""
    return sum(keys.nbytes + values.nbytes for keys, values in states)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin alike with."""
    most = min(len(one), len(other))
    for i in range(most):
        if one[i] != other[i]:
            return i
    return most


# ---------------------------------------------------------------------------------------------- one by one


class SeparateSequences(SequenceBatch):
    """Each sequence by a writer of its own."""

    def __init__(self, architecture: Architecture, model: Network, attached: Any):
        super().__init__()
        self.architecture, self.model, self.attached = architecture, model, attached
        self.writers: list[Writer] = []

    def read(self, readings):
        reading = readings[0]
        reading.state, logits = self.written(reading)
        reading.done = len(reading.tokens)
        return logits

    def written(self, reading: Reading) -> tuple[Writer, Tensor]:
        """(a writer that has read a prompt, its logits)"""
        writer, _ = self.architecture.writer(self.model, self.attached)
        prompts = [list(reading.tokens)]
        writer.announce(prompts, [])
        return writer, writer.begin(prompts, 1)

    def join(self, reading):
        writer, reading.state = reading.state, None
        if writer is None:  # a further sample of the same prompt
            writer, _ = self.written(reading)
        self.writers.append(writer)
        self.adapters.append(None)
        return len(self) - 1

    def leave(self, row):
        last = len(self) - 1
        self.writers[row] = self.writers[last]
        self.writers.pop()
        self.adapters.pop()
        return last if row < last else None

    def next(self, tokens):
        logits = []
        for writer, token in zip(self.writers, tokens, strict=True):
            device = self.model.get_input_embeddings().weight.device
            logits.append(writer.next(torch.tensor([token], device=device)))
        return torch.cat(logits)

    def clear(self):
        self.writers, self.adapters = [], []


# ---------------------------------------------------------------------------------------------- which of them


@torch.no_grad()
def sequence_batch(
    architecture: Architecture,
    model: Network,
    attached: Any,
    adapters: RowAdapters | None = None,
    prefix_bytes: int = PREFIX_BYTES,
) -> SequenceBatch:
    """A batch for a network, tried out: side by side where that writes what reading everything again writes.
    A warning says where it does not.

    Raises RecipeError or NotImplementedError where the network does not write at all.
    """
    writer, _ = architecture.writer(model, attached)
    separate = SeparateSequences(architecture, model, attached)
    if not isinstance(writer, Cached) or writer.prefix or attached.follows_rows():
        return separate
    try:
        batch = SideBySide(model, attached, adapters, prefix_bytes)
        gap, tolerance = _trial(batch)
        if gap <= tolerance:
            return batch
        reason = f"log-probabilities differ by {gap:.1e} on average"
    except CANNOT as error:
        if out_of_memory(error):
            raise
        first_line, _, _ = str(error).partition("\n")
        reason = f"{type(error).__name__}: {first_line[:100]}"
    name = type(model).__name__
    warnings.warn(
        f"{name} cannot write several sequences in one pass ({reason}); each is written alone", stacklevel=2
    )
    return separate


def _trial(batch: SideBySide) -> tuple[float, float]:
    """How far the log-probabilities of sequences that join and leave are from those of reading everything
    again, on average; and how far they may be.
    """
    plain = Rereading(batch.model, batch.attached)
    # words, not the special tokens at the beginning of vocabularies, which networks answer at random
    words = len(batch.model.get_input_embeddings().weight)
    one, two, three = words // 2, words // 3, words // 5
    texts = [[one], [one, two, three, one, two], [two, three]]
    logits, expected = [], []

    def join(text: list[int]) -> None:
        reading = batch.begin(text)
        logits.append(batch.read([reading]))
        expected.append(plain.begin([text], 1))
        batch.join(reading)

    def write(token: int) -> None:
        logits.append(batch.next([token] * len(batch)))
        expected.append(plain.begin([list(tokens) for tokens in batch.tokens], 1))

    join(texts[0])
    write(two)
    join(texts[1])
    write(three)
    batch.leave(0)
    join(texts[2])
    write(one)
    write(two)
    batch.clear()
    right = torch.cat(expected).float().log_softmax(-1)
    gaps = torch.cat(logits).float().log_softmax(-1) - right
    return float(gaps.abs().mean()), logprob_tolerance(batch.model, right)
