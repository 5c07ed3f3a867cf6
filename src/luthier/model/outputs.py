"""A network's outputs for a batch: of supervised tokens alone, and through its head in chunks alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.kernels.logprobs import Head, chunk_size, chunked, normaliser

# are the states behind single blocks needed, too?
LAYERS: ContextVar[bool] = ContextVar("layers", default=False)


class Outputs:
    """Outputs for the supervised tokens of a batch. Objectives see log-probabilities; never logits, layouts,
    masks or padding.

    Where rows have supervised tokens in common, what predicts them goes through the head once (U of T), and
    the weights of all rows on such a token add up in its gradient.
    """

    def __init__(
        self,
        states: Tensor,
        head: Head,
        labels: Tensor,
        role_context: Callable[[], AbstractContextManager] = nullcontext,
        which: Tensor | None = None,
    ):
        """states [U, d]; labels [T]; which [T]: the state that predicts each token, None where each has its
        own (U = T). Tokens of one state have one label.
        """
        self.states = states
        self.head = head
        self.labels = labels
        self.role_context = role_context  # the head, too, is applied in it
        self.which = which
        # [T, d] the same places behind each block, where they were needed (Policy.layers)
        self.layers: list[Tensor] | None = None

    @cached_property
    def hidden(self) -> Tensor:
        """[T, d] the state that predicts each supervised token."""
        return self.by_token(self.states)

    def by_token(self, values: Tensor) -> Tensor:
        """[U, ...] -> [T, ...]"""
        return values if self.which is None else values.index_select(0, self.which)

    @cached_property
    def logprobs(self) -> Tensor:
        """[T] log-probability of each supervised token."""
        labels = self.labels
        if self.which is not None:
            labels = labels.new_empty(len(self.states)).index_copy_(0, self.which, labels)
        if not self.head.linear:
            own = self._chunks(lambda z, i: z.gather(1, i) - normaliser(z), [self], [labels[:, None]])
            return self.by_token(own).squeeze(1)
        with self.role_context():
            return self.by_token(chunked(self.states, self.head, labels))

    @property
    def checked_values(self) -> Tensor:
        """[T] what layouts and kernels are compared by: here the log-probabilities."""
        return self.logprobs

    @cached_property
    def entropy(self) -> Tensor:
        """[T] of the whole distribution, in nats."""

        def entropy(z: Tensor) -> Tensor:
            logp = z.log_softmax(-1)
            return -(logp.exp() * logp).sum(-1)

        return self.apply(entropy)

    def at(self, ids: Tensor) -> Tensor:
        """[T, k] token ids -> [T, k] their log-probabilities."""
        return self.apply(lambda z, i: z.gather(1, i) - normaliser(z), ids)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens of each question: log-probabilities [T, k] and ids [T, k]."""

        def top(z: Tensor) -> tuple[Tensor, Tensor]:
            best, ids = z.topk(min(k, z.shape[-1]))
            return best - normaliser(z), ids

        return self.apply(top)

    def first(self) -> Tensor:
        """[T] the likeliest token of each question; how likely it is costs as much again."""
        return self.apply(lambda z: z.topk(1)[1]).squeeze(1)

    def apply(self, f: Callable, *per_token: Tensor, beside: Sequence[Outputs] = ()) -> Any:
        """f(logits [C, V], ...) over chunks, recomputed in backward, so [T, V] never exists.

        per_token: tensors [T, ...] whose chunks follow the logits in f. beside: further outputs for the same
        questions (a teacher, a second pass); their logits follow ours in f. f returns a tensor [C, ...] or a
        tuple of them.
        """
        every = (self, *beside)
        if per_token or not all(_same_index(self.which, o.which) for o in beside):
            return self._chunks(f, every, per_token, by_token=True)
        results = self._chunks(f, every)
        if torch.is_tensor(results):
            return self.by_token(results)
        return tuple(map(self.by_token, results))

    def _chunks(
        self,
        f: Callable,
        every: Sequence[Outputs],
        further: Sequence[Tensor] = (),
        by_token: bool = False,
    ) -> Any:
        """`apply` on the states of all these, or on those of each token; further: tensors of as many rows."""
        tables = [o.hidden if by_token else o.states for o in every]
        widest = max(o.head.size(h) for o, h in zip(every, tables, strict=True))
        size = max(1, chunk_size(widest, self.states.device) // len(every))
        tables += further

        def piece(*chunk: Tensor) -> Any:
            logits = []
            for outputs, states in zip(every, chunk, strict=False):
                with outputs.role_context():  # the head is applied in the role that read the batch
                    logits.append(outputs.head(states))
            return f(*logits, *chunk[len(every) :])

        results = []
        for chunk in zip(*(table.split(size) for table in tables), strict=True):
            if torch.is_grad_enabled():
                results.append(checkpoint(piece, *chunk, use_reentrant=False))
            else:
                results.append(piece(*chunk))
        if torch.is_tensor(results[0]):
            return torch.cat(results)
        return tuple(map(torch.cat, zip(*results, strict=True)))


def _same_index(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
