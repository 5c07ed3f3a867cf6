"""Row features: the hidden state that predicts the first token of a row's answer; the row's class is its
answer.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from luthier.model.batch import Batch

SPREAD = 6364136223846793005  # odd: numbers of tokens that differ somewhere differ, but for one case in 2^63


def answered(batch: Batch) -> Tensor:
    """[N'] the sequences that ask something: one feature each."""
    return batch.lengths.nonzero()[:, 0]


def features(batch: Batch, outputs: Any) -> Tensor:
    """[N', d] the state that predicts the first asked token of each sequence, in fp32."""
    return outputs.hidden[batch.place == 0].float()


def classes(batch: Batch) -> Tensor:
    """[N'] a number for what each sequence answers: alike where all its asked tokens are alike."""
    tokens = batch.labels[batch.targets] + 1
    return batch.sums(tokens * torch.full_like(tokens, SPREAD).pow(batch.place + 1))[answered(batch)]


def of_rows(batch: Batch) -> Tensor:
    """[N'] a number for the row of each."""
    names = [
        int.from_bytes(hashlib.blake2b(str(row["id"]).encode(), digest_size=8).digest(), "big") >> 1
        for row in batch.rows
    ]
    return torch.tensor(names, device=batch.ids.device)[batch.group[answered(batch)]]
