"""What is learned from: a tree of token segments, and which of these tokens are predicted. No layout, no
padding.

A segment continues its parent: the completions of a row all continue its prompt. The architecture decides how
the tree becomes rows of a tensor (packed, prompts read once, or padded), and every layout answers alike.

Letters in shapes: L tokens, T target tokens (supervised), S segments, N sequences (completions), G groups
(rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.kernels.transfer import to_device
from luthier.registry import did_you_mean

# what a batch consists of, and which of it says how its segments hang together
TENSORS = ("ids", "labels", "supervised", "segment", "parent", "completion", "group")
STRUCTURE = frozenset(TENSORS[2:])
# indices that follow from the structure: sent along, and the same in every view that does not change it
INDICES = ("targets", "owner", "row", "lengths", "place")
FOLLOWING = (*INDICES, "sizes", "parents", "spans")


@dataclass(frozen=True)
class Batch:
    """Rows as tokens. Built by `collate`; `view` makes variants with the same supervised tokens and other
    inputs.
    """

    ids: Tensor  # [L] the tokens that are read, one segment after another
    labels: Tensor  # [L] the tokens to be predicted; views corrupt ids, never labels
    supervised: Tensor  # [L] bool: does the log-probability of this token count?
    segment: Tensor  # [L] the segment of each token, ascending
    parent: Tensor  # [S] the segment that a segment continues, -1 for a root
    completion: Tensor  # [N] the segments that are completions, one per sequence
    group: Tensor  # [N] the row that a sequence belongs to
    rows: list[dict]  # [G] the rows themselves: ids and further columns
    altered: bool = False  # is this a view with other inputs than those of the rows?
    # other tokens [L] and shares [L]: embeddings are (1 - share) * own + share * other's
    mixed: tuple[Tensor, Tensor] | None = None
    # the batch on the CPU that this one was sent from: its structure is this one's, its tokens may be others
    host: Batch | None = field(default=None, compare=False, repr=False)
    # role -> its outputs for this batch
    read: dict = field(default_factory=dict, compare=False, repr=False)
    metrics: dict = field(default_factory=dict, compare=False, repr=False)  # what objectives noted

    def view(self, **changes: Any) -> Batch:
        """The same supervised tokens, with no outputs stored yet; with changes, of other inputs (corrupted,
        mixed).
        """
        altered = self.altered or bool({"ids", "parent", "mixed"} & changes.keys())
        if STRUCTURE & changes.keys():
            return replace(self, read={}, altered=altered, host=None, **changes)
        view = replace(self, read={}, altered=altered, **changes)
        for name in FOLLOWING:
            if name in self.__dict__:
                view.__dict__[name] = self.__dict__[name]
        return view

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device, with nothing remembered and nothing noted. Indices are computed on the
        CPU and sent along: on a GPU, most of them would have to be waited for.
        """
        device = torch.device(device)
        tensors = {name: getattr(self, name) for name in TENSORS}
        if device.type != "cuda" or not self.ids.is_cpu:
            tensors = {name: x.to(device) for name, x in tensors.items()}
            return replace(self, read={}, metrics={}, host=None, **tensors)
        indices = {name: getattr(self, name) for name in INDICES}
        sent = to_device({**tensors, **indices}, device)
        tensors = {name: sent.pop(name) for name in TENSORS}
        there = replace(self, read={}, metrics={}, host=self, **tensors)
        there.__dict__.update(sent, sizes=self.sizes, parents=self.parents)
        return there

    def sent(self, values: Tensor) -> Tensor:
        """values of the CPU on this batch's device."""
        return to_device({"": values}, self.ids.device)[""]

    # ------------------------------------------------------------------------------------------ indices

    @cached_property
    def targets(self) -> Tensor:
        """[T] where the target tokens stand in `ids`."""
        return self.supervised.nonzero().squeeze(1)

    @cached_property
    def parents(self) -> list[int]:
        """[S] the segment that a segment continues, -1 for a root."""
        return self.parent.tolist()

    @cached_property
    def owner(self) -> Tensor:
        """[T] the sequence of each target token."""
        place = torch.full_like(self.parent, -1)
        place[self.completion] = torch.arange(len(self.completion), device=self.ids.device)
        return place[self.segment[self.targets]]

    @cached_property
    def row(self) -> Tensor:
        """[S] the row of each segment."""
        parents = self.parents
        rows = [-1] * len(parents)
        for s, g in zip(self.completion.tolist(), self.group.tolist(), strict=True):
            while s >= 0:  # the completion's own segment, then those it continues
                rows[s] = g
                s = parents[s]
        return torch.tensor(rows, device=self.ids.device)

    @cached_property
    def sizes(self) -> list[int]:
        """[S] tokens of each segment."""
        return torch.bincount(self.segment, minlength=len(self.parent)).tolist()

    @cached_property
    def lengths(self) -> Tensor:
        """[N] target tokens of each sequence, as floats."""
        return torch.bincount(self.owner, minlength=len(self.completion)).float()

    @cached_property
    def place(self) -> Tensor:
        """[T] the number of each target token in its sequence: 0, 1, 2, ..."""
        before = self.lengths.long().cumsum(0) - self.lengths.long()
        return torch.arange(len(self.owner), device=self.ids.device) - before[self.owner]

    @cached_property
    def prompt_places(self) -> Tensor:
        """[L] the number of each token in its row's prompt, -1 where it is in a completion."""
        place = torch.arange(len(self.ids), device=self.ids.device)
        sizes = self.sent(torch.tensor(self.sizes))
        first = (sizes.cumsum(0) - sizes)[self.segment]
        root = self.parent < 0
        root[self.completion] = False
        return torch.where(root[self.segment], place - first, -1)

    @cached_property
    def spans(self) -> Tensor:
        """[L] tokens of the longest sequence that a token is part of."""
        parents, above, below = self.parents, list(self.sizes), list(self.sizes)
        for s, under in enumerate(parents):  # a segment stands behind the one it continues
            if under >= 0:
                above[s] += above[under]
        for s in reversed(range(len(parents))):
            if parents[s] >= 0:
                below[parents[s]] = max(below[parents[s]], self.sizes[parents[s]] + below[s])
        whole = [a + b - n for a, b, n in zip(above, below, self.sizes, strict=True)]
        return self.sent(torch.tensor(whole))[self.segment]

    def segments(self) -> list[Tensor]:
        """[S] lists of places in `ids`."""
        return list(torch.arange(len(self.ids), device=self.ids.device).split(self.sizes))

    def count(self, unit: str) -> int:
        """How many units an objective averages over: tokens, sequences, groups or the batch itself."""
        return {
            "token": len(self.owner),
            "sequence": len(self.completion),
            "group": len(self.rows),
            "batch": 1,
        }[unit]

    # ------------------------------------------------------------------------------------------ values

    def sums(self, values: Tensor) -> Tensor:
        """[T] -> [N] sum over each sequence."""
        return values.new_zeros(len(self.completion)).index_add(0, self.owner, values)

    def means(self, values: Tensor) -> Tensor:
        """[T] -> [N] mean over each sequence's target tokens (0 where there are none)."""
        return self.sums(values) / self.lengths.clamp(min=1)

    def last(self, values: Tensor) -> Tensor:
        """[T] -> [N] the value at each sequence's last target token."""
        return values[self.lengths.long().cumsum(0) - 1]

    def suffix(self, values: Tensor, gamma: float = 1.0) -> Tensor:
        """[T] -> [T] the sum over this and all later target tokens of the same sequence (reward to go), each
        step later times gamma.
        """
        left, step = self.lengths[self.owner].long() - self.place, 1
        longest = int((self.host or self).lengths.max())
        while step < longest:  # sums over 1, 2, 4, ... target tokens
            ahead = torch.cat([values[step:], values.new_zeros(min(step, len(values)))])
            values = values + gamma**step * torch.where(left > step, ahead, 0)
            step *= 2
        return values

    def over_group(self, values: Tensor, reduce: str = "mean") -> Tensor:
        """[N] -> [N] each sequence gets its row's sum, mean, amax or amin."""
        zeros = values.new_zeros(len(self.rows))
        by_row = zeros.scatter_reduce(0, self.group, values, reduce, include_self=False)
        return by_row[self.group]

    # ------------------------------------------------------------------------------------------ columns

    def column(self, name: str) -> Tensor:
        """[N] one number per sequence out of the rows, e.g. scores."""
        values: list[float] = []
        for row in self.rows:
            values += map(float, row[name])
        return self.sent(torch.tensor(values))

    def reward(self, name: str) -> Tensor:
        """[N] one of several rewards of the column `rewards`, {name: a number for each completion}."""
        values: list[float] = []
        for row in self.rows:
            if name not in row["rewards"]:
                raise RecipeError(
                    f"row {row['id']} has no reward '{name}' in its column"
                    f" `rewards`{did_you_mean(name, row['rewards'])}"
                )
            values += map(float, row["rewards"][name])
        return self.sent(torch.tensor(values))

    def weights(self) -> Tensor | None:
        """[T] how much each target token counts: the column `token_weights`, 1 in rows without it; None where
        no row has it.
        """
        if not any("token_weights" in row for row in self.rows):
            return None
        sizes, values = iter((self.host or self).lengths.long().tolist()), []
        for row in self.rows:
            for k in range(len(row["completions"])):
                n = next(sizes)
                weights = [1.0] * n
                if "token_weights" in row:
                    weights = row["token_weights"][k]
                if len(weights) != n:
                    raise RecipeError(
                        f"token_weights of row {row['id']} has {len(weights)} values for {n}"
                        " supervised tokens: it was computed for another completion, tokenizer"
                        " or max_length"
                    )
                values += weights
        return self.sent(torch.tensor(values, dtype=torch.float32))

    def per_token(self, name: str) -> Tensor:
        """[T] one number per target token, from a column of lists that a stage wrote."""
        if self.altered:
            raise RecipeError(
                f"column '{name}' was computed for the unmodified rows, but this objective also"
                " evaluates modified ones; use a model for this role, e.g. `roles: {reference:"
                " initial}`"
            )
        values: list[float] = []
        for row in self.rows:
            for completion in row[name]:
                values += map(float, completion)
        if len(values) != len(self.owner):
            raise RecipeError(
                f"column '{name}' has {len(values)} values for {len(self.owner)} supervised"
                f" tokens (rows {[row['id'] for row in self.rows][:4]}): it was computed for"
                " other completions, another tokenizer or max_length"
            )
        return self.sent(torch.tensor(values))

    def table(self, name: str) -> Tensor:
        """[T, k] a list of k numbers per target token, from a column of them for each completion."""
        if self.altered:
            raise RecipeError(
                f"column '{name}' was computed for the unmodified rows, but this objective also"
                " evaluates modified ones; use a model for this role"
            )
        values: list[list[float]] = []
        for row in self.rows:
            for completion in row[name]:
                values += completion
        if len(values) != len(self.owner):
            raise RecipeError(
                f"column '{name}' has {len(values)} lists for {len(self.owner)} supervised"
                " tokens: it was computed for other completions, another tokenizer or"
                " max_length"
            )
        dtype = torch.long
        if values and isinstance(values[0][0], float):
            dtype = torch.float32
        return self.sent(torch.tensor(values, dtype=dtype))

    def note(self, **metrics: Tensor) -> None:
        """Keep a number for the log: the mean of what is given, over this batch."""
        for name, value in metrics.items():
            value = value.detach().float()
            total, count = self.metrics.get(name, (0.0, 0))
            # a GPU's sum is read at the end of the step, with all others
            own = float(value.sum()) if value.is_cpu else value.sum()
            self.metrics[name] = (total + own, count + value.numel())


def collate(rows: Sequence[dict], encode: Callable[[dict], Any]) -> Batch:
    """Rows -> Batch. `encode(row)` gives the tokens of a prompt, and of its completions with their supervised
    marks.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    segment: list[int] = []
    parent: list[int] = []
    completion, group = [], []

    def grow(tokens: Sequence[int], marks: Sequence[bool], under: int) -> int:
        segment.extend([len(parent)] * len(tokens))
        ids.extend(tokens)
        supervised.extend(marks)
        parent.append(under)
        return len(parent) - 1

    for g, row in enumerate(rows):
        encoded = encode(row)
        root = grow(encoded.prompt, [False] * len(encoded.prompt), -1)
        for tokens, marks in zip(encoded.completions, encoded.supervised, strict=True):
            completion.append(grow(tokens, marks, root))
            group.append(g)
    read = torch.tensor(ids, dtype=torch.long)
    return Batch(
        ids=read,
        labels=read,
        supervised=torch.tensor(supervised, dtype=torch.bool),
        segment=torch.tensor(segment, dtype=torch.long),
        parent=torch.tensor(parent, dtype=torch.long),
        completion=torch.tensor(completion, dtype=torch.long),
        group=torch.tensor(group, dtype=torch.long),
        rows=list(rows),
    )


def pad(rows: list[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [R, W] padded on the right, and the mask [R, W] of real places."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(r) for r in rows], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
